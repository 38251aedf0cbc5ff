//! Recorded changes, done again on a disk in memory, as far as a power loss would have let them come.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use super::recorder::{Attributes, Change};

/// A directory tree in memory, by inodes.
#[derive(Clone, Debug)]
pub struct Disk {
    nodes: Vec<Node>,
}

#[derive(Clone, Debug)]
struct Node {
    attributes: Attributes,
    content: Content,
}

#[derive(Clone, Debug)]
enum Content {
    Dir(BTreeMap<OsString, usize>),
    File(Vec<u8>),
    Link(PathBuf),
}

/// A change by inodes: what one may do without the other.
#[derive(Clone, Debug)]
enum Step {
    /// Names in directories, all at once.
    Names(Vec<(usize, OsString, Option<usize>)>),
    Write(usize, u64, Vec<u8>),
    Cut(usize, u64),
    Attributes(usize, Attributes),
    Sync(usize),
}

impl Step {
    /// The inodes that must be synced for this to last.
    fn nodes(&self) -> Vec<usize> {
        match self {
            Step::Names(names) => names.iter().map(|(dir, ..)| *dir).collect(),
            Step::Write(node, ..) | Step::Cut(node, _) | Step::Attributes(node, _) => vec![*node],
            Step::Sync(_) => Vec::new(),
        }
    }

    fn is_data(&self) -> bool {
        matches!(self, Step::Write(..) | Step::Cut(..))
    }
}

/// What is on the disk after a power loss: every path below its root, with all that it says.
pub type Files = BTreeMap<PathBuf, (Attributes, Option<Vec<u8>>, Option<PathBuf>)>;

impl Disk {
    /// A copy of what is at `root` now.
    pub fn copy(root: &Path) -> Disk {
        let mut disk = Disk { nodes: Vec::new() };
        let mut hard = HashMap::new();
        disk.copy_node(root, &mut hard);
        disk
    }

    fn copy_node(&mut self, path: &Path, hard: &mut HashMap<u64, usize>) -> usize {
        let meta = fs::symlink_metadata(path).expect("nobody removes it now");
        if let Some(known) = hard.get(&meta.ino()) {
            return *known;
        }
        let attributes = Attributes::of(&meta);
        let number = self.nodes.len();
        hard.insert(meta.ino(), number);
        let content = Content::Dir(BTreeMap::new());
        self.nodes.push(Node { attributes, content });
        let content = if meta.is_dir() {
            let entries = fs::read_dir(path).expect("root reads it").flatten();
            let names = entries.map(|entry| (entry.file_name(), self.copy_node(&entry.path(), hard)));
            Content::Dir(names.collect())
        } else if meta.is_symlink() {
            Content::Link(fs::read_link(path).expect("it is a link"))
        } else if meta.is_file() {
            Content::File(fs::read(path).expect("root reads it"))
        } else {
            // A FIFO or a socket is deleted like a file.
            Content::File(Vec::new())
        };
        self.nodes[number].content = content;
        number
    }

    fn entries(&mut self, node: usize) -> &mut BTreeMap<OsString, usize> {
        match &mut self.nodes[node].content {
            Content::Dir(entries) => entries,
            other => panic!("{other:?} is no directory"),
        }
    }

    fn find(&mut self, root: &Path, path: &Path) -> Option<usize> {
        let mut node = 0;
        for part in path.strip_prefix(root).expect("it is below") {
            node = *self.entries(node).get(part)?;
        }
        Some(node)
    }

    fn parent(&mut self, root: &Path, path: &Path) -> Option<(usize, OsString)> {
        let parent = self.find(root, path.parent()?)?;
        Some((parent, path.file_name()?.to_owned()))
    }

    fn apply(&mut self, step: &Step) {
        match step {
            Step::Names(names) => {
                for (dir, name, node) in names {
                    match node {
                        Some(node) => drop(self.entries(*dir).insert(name.clone(), *node)),
                        None => drop(self.entries(*dir).remove(name)),
                    }
                }
            }
            Step::Write(node, at, bytes) => {
                if let Content::File(data) = &mut self.nodes[*node].content {
                    let end = *at as usize + bytes.len();
                    data.resize(data.len().max(end), 0);
                    data[*at as usize..end].copy_from_slice(bytes);
                }
            }
            Step::Cut(node, length) => {
                if let Content::File(data) = &mut self.nodes[*node].content {
                    data.resize(*length as usize, 0);
                }
            }
            Step::Attributes(node, attributes) => self.nodes[*node].attributes = *attributes,
            Step::Sync(_) => {}
        }
    }

    /// All that can be reached.
    pub fn content(&self) -> Files {
        let mut all = BTreeMap::new();
        let mut waiting = vec![(PathBuf::new(), 0)];
        while let Some((path, node)) = waiting.pop() {
            let Node { attributes, content } = &self.nodes[node];
            let (file, link) = match content {
                Content::Dir(entries) => {
                    waiting.extend(entries.iter().map(|(name, node)| (path.join(name), *node)));
                    (None, None)
                }
                Content::File(data) => (Some(data.clone()), None),
                Content::Link(target) => (None, Some(target.clone())),
            };
            all.insert(path, (*attributes, file, link));
        }
        all
    }
}

/// Put this below `root`, which is there and empty.
pub fn put(content: &Files, root: &Path) {
    for (path, (attributes, file, link)) in content.iter().filter(|(path, _)| !path.as_os_str().is_empty()) {
        let place = root.join(path);
        let owner =
            |place: &Path| chown(place, Some(attributes.uid), Some(attributes.gid)).expect("root may");
        match (file, link) {
            (Some(data), _) => fs::write(&place, data).expect("the test's directory is writable"),
            (_, Some(target)) => {
                symlink(target, &place).expect("the test's directory is writable");
                continue;
            }
            _ => fs::create_dir(&place).expect("the test's directory is writable"),
        }
        owner(&place);
        fs::set_permissions(&place, fs::Permissions::from_mode(attributes.mode)).expect("root may");
    }
}

/// What was recorded, as steps on a disk that was so when it began.
#[derive(Debug)]
pub struct Replay {
    /// With all inodes that are ever made, as they are made.
    base: Disk,
    steps: Vec<Step>,
    /// For each step, its change, human-readable.
    pub changes: Vec<Change>,
}

impl Replay {
    /// `base` is what was at `root` before the first change; changes elsewhere are left out.
    pub fn new(base: Disk, root: &Path, changes: &[Change]) -> Replay {
        let (mut all, mut now) = (base.clone(), base);
        let (mut steps, mut kept) = (Vec::new(), Vec::new());
        for change in changes {
            let Some(step) = step(&mut all, &mut now, root, change) else {
                continue;
            };
            now.apply(&step);
            steps.push(step);
            kept.push(change.clone());
        }
        Replay {
            base: all,
            steps,
            changes: kept,
        }
    }

    /// How many cuts there are: before each step, and after the last.
    pub fn cuts(&self) -> usize {
        self.steps.len() + 1
    }

    fn with(&self, steps: impl Iterator<Item = Step>) -> Files {
        let mut disk = self.base.clone();
        steps.for_each(|step| disk.apply(&step));
        disk.content()
    }

    /// All that was done before the cut, and nothing else.
    pub fn in_order(&self, cut: usize) -> Files {
        self.with(self.steps[..cut].iter().cloned())
    }

    /// Has the step come to the disk for sure, when the power goes at the cut?
    fn lasts(&self, step: usize, cut: usize) -> bool {
        let synced = |node: usize| {
            self.steps[step..cut]
                .iter()
                .any(|later| matches!(later, Step::Sync(other) if *other == node))
        };
        self.steps[step].nodes().into_iter().all(synced)
    }

    /// What a disk may have that keeps what was synced, and of the rest what it likes: nothing; all but the data;
    /// half of the data; all but one change; nothing but one change. `single` says of which changes to try that.
    pub fn at_worst(&self, cut: usize, single: impl Fn(&Change) -> bool) -> Vec<Files> {
        let lasting: Vec<bool> = (0..cut).map(|step| self.lasts(step, cut)).collect();
        let steps = || self.steps[..cut].iter().enumerate();
        let some = |keep: &dyn Fn(usize, &Step) -> bool| {
            self.with(
                steps()
                    .filter(|(n, step)| lasting[*n] || keep(*n, step))
                    .map(|(_, step)| step.clone()),
            )
        };
        let mut all = vec![some(&|_, _| false), some(&|_, step| !step.is_data())];
        all.push(self.with(steps().map(|(n, step)| match step {
            Step::Write(node, at, bytes) if !lasting[n] => {
                Step::Write(*node, *at, bytes[..bytes.len() / 2].to_vec())
            }
            step => step.clone(),
        })));
        let loose: BTreeSet<usize> = (0..cut)
            .filter(|n| !lasting[*n] && !matches!(self.steps[*n], Step::Sync(_)) && single(&self.changes[*n]))
            .collect();
        for one in loose {
            all.push(some(&|n, _| n != one));
            all.push(some(&|n, _| n == one));
        }
        all
    }
}

/// `all` gets the inodes; `now` is how the names are at this moment.
fn step(all: &mut Disk, now: &mut Disk, root: &Path, change: &Change) -> Option<Step> {
    let mut make = |now: &mut Disk, attributes: Attributes, content: Content| {
        for disk in [&mut *all, now] {
            disk.nodes.push(Node {
                attributes,
                content: content.clone(),
            });
        }
        all.nodes.len() - 1
    };
    let nobodys = Attributes {
        mode: 0o777,
        uid: 0,
        gid: 0,
    };
    Some(match change {
        Change::Make { path, attributes } => {
            let (dir, name) = now.parent(root, path)?;
            let node = make(now, *attributes, Content::File(Vec::new()));
            Step::Names(vec![(dir, name, Some(node))])
        }
        Change::MakeDir { path, attributes } => {
            let (dir, name) = now.parent(root, path)?;
            let node = make(now, *attributes, Content::Dir(BTreeMap::new()));
            Step::Names(vec![(dir, name, Some(node))])
        }
        Change::Symlink { path, target } => {
            let (dir, name) = now.parent(root, path)?;
            let node = make(now, nobodys, Content::Link(target.clone()));
            Step::Names(vec![(dir, name, Some(node))])
        }
        Change::Remove { path } => {
            let (dir, name) = now.parent(root, path)?;
            Step::Names(vec![(dir, name, None)])
        }
        Change::Rename { from, to } => {
            let node = now.find(root, from)?;
            let (from, to) = (now.parent(root, from)?, now.parent(root, to)?);
            Step::Names(vec![(from.0, from.1, None), (to.0, to.1, Some(node))])
        }
        Change::Link { from, to } => {
            let node = now.find(root, from)?;
            let (dir, name) = now.parent(root, to)?;
            Step::Names(vec![(dir, name, Some(node))])
        }
        Change::Write { path, at, bytes } => Step::Write(now.find(root, path)?, *at, bytes.clone()),
        Change::Cut { path, length } => Step::Cut(now.find(root, path)?, *length),
        Change::Attributes { path, attributes } => Step::Attributes(now.find(root, path)?, *attributes),
        Change::Sync { path } => Step::Sync(now.find(root, path)?),
    })
}
