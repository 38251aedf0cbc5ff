//! The helper's folders say what a process that runs their code may still do. Imports go from a folder to those with fewer
//! privileges, never back, and no module imports one that imports it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use syn::visit::{self, Visit};
use syn::{Item, ItemMod, ItemUse, UseTree};
use testbed::sources::{files, is_for_tests, read};

/// From the top. A module imports from its own folder, and from those after it.
const FLOORS: [&[&str]; 7] = [
    &["manual"],
    &["monitor"],
    &["session"],
    &["sandbox"],
    &["unprivileged"],
    &["host"],
    &["privileges", "monitor_ipc", "log", "sys"],
];

fn floor(module: &str) -> usize {
    let folder = module.split("::").next().unwrap();
    FLOORS
        .iter()
        .position(|folders| folders.contains(&folder))
        .unwrap_or_else(|| panic!("{module} is in no folder that this test knows"))
}

/// A module's own items and paths, without those of its tests.
struct Paths {
    found: Vec<Vec<String>>,
    children: BTreeSet<String>,
}

impl Paths {
    fn of_use(&mut self, tree: &UseTree, before: &[String]) {
        let with = |word: String| [before, &[word]].concat();
        match tree {
            UseTree::Path(it) => self.of_use(&it.tree, &with(it.ident.to_string())),
            UseTree::Name(it) if it.ident == "self" => self.found.push(before.to_vec()),
            UseTree::Name(it) => self.found.push(with(it.ident.to_string())),
            UseTree::Rename(it) => self.found.push(with(it.ident.to_string())),
            UseTree::Glob(_) => self.found.push(before.to_vec()),
            UseTree::Group(it) => it.items.iter().for_each(|tree| self.of_use(tree, before)),
        }
    }
}

impl<'a> Visit<'a> for Paths {
    fn visit_item_mod(&mut self, it: &'a ItemMod) {
        if !is_for_tests(&it.attrs) {
            self.children.insert(it.ident.to_string());
            visit::visit_item_mod(self, it);
        }
    }

    fn visit_item_use(&mut self, it: &'a ItemUse) {
        self.of_use(&it.tree, &[]);
    }

    fn visit_path(&mut self, it: &'a syn::Path) {
        self.found
            .push(it.segments.iter().map(|part| part.ident.to_string()).collect());
        visit::visit_path(self, it);
    }

    // `pub(super)` imports nothing.
    fn visit_visibility(&mut self, _: &'a syn::Visibility) {}

    // What a macro is given is tokens: `crate::` in it is found as text.
    fn visit_macro(&mut self, it: &'a syn::Macro) {
        let text = it.tokens.to_string().replace(' ', "");
        for (at, _) in text.match_indices("crate::") {
            let end = |c: char| !(c.is_alphanumeric() || c == '_' || c == ':');
            let path = text[at..].split(end).next().unwrap();
            self.found.push(path.split("::").map(String::from).collect());
        }
        visit::visit_macro(self, it);
    }
}

/// All files of a crate, by the names of their modules; its own file, and the programs', have none.
fn modules(sources: &str) -> BTreeMap<String, PathBuf> {
    let mut found = BTreeMap::new();
    for path in files(sources) {
        let name = path
            .strip_prefix(sources)
            .expect("it is below")
            .with_extension("");
        let name = name.to_str().expect("a plain name").replace('/', "::");
        let name = name.strip_suffix("::mod").unwrap_or(&name).to_owned();
        if !["lib", "main", "manual::main"].contains(&name.as_str()) {
            found.insert(name, path);
        }
    }
    found
}

/// The paths of a file, without those of its tests.
fn paths(path: &Path) -> Paths {
    let mut paths = Paths {
        found: Vec::new(),
        children: BTreeSet::new(),
    };
    for item in &syn::parse_file(&read(path)).unwrap().items {
        if !matches!(item, Item::Mod(it) if is_for_tests(&it.attrs)) {
            paths.visit_item(item);
        }
    }
    paths
}

/// Which module of the crate a path in `module` leads to, if to one. `of_crate`: what the crate's own file has imported, by
/// its name, for others to import from there.
fn target(
    path: &[String],
    module: &str,
    children: &BTreeSet<String>,
    all: &BTreeSet<&str>,
    of_crate: &BTreeMap<String, Vec<String>>,
) -> Option<String> {
    let mut from: Vec<&str> = module.split("::").collect();
    let mut rest = path;
    match path.first()?.as_str() {
        "crate" => {
            from.clear();
            rest = path
                .get(1)
                .and_then(|name| of_crate.get(name))
                .map_or(&path[1..], Vec::as_slice);
        }
        "self" => rest = &path[1..],
        "super" => {
            while rest.first().is_some_and(|word| word == "super") {
                from.pop();
                rest = &rest[1..];
            }
        }
        first if children.contains(first) => {}
        _ => return None,
    }
    let absolute: Vec<&str> = from.into_iter().chain(rest.iter().map(String::as_str)).collect();
    (1..=absolute.len())
        .rev()
        .map(|length| absolute[..length].join("::"))
        .find(|name| all.contains(name.as_str()))
}

/// Each module of a crate with those that it imports.
fn imports(sources: &str) -> BTreeMap<String, BTreeSet<String>> {
    let modules = modules(sources);
    let all: BTreeSet<&str> = modules.keys().map(String::as_str).collect();
    let of_crate = paths(&Path::new(sources).join("lib.rs")).found;
    let of_crate = of_crate
        .into_iter()
        .filter(|path| path.len() > 1)
        .map(|path| (path[path.len() - 1].clone(), path))
        .collect();
    let mut imports = BTreeMap::new();
    for (name, path) in &modules {
        let paths = paths(path);
        let to = paths
            .found
            .iter()
            .filter_map(|path| target(path, name, &paths.children, &all, &of_crate));
        let to: BTreeSet<String> = to.filter(|to| to != name).collect();
        imports.insert(name.clone(), to);
    }
    imports
}

#[test]
fn no_module_imports_from_a_folder_with_more_privileges() {
    let imports = imports("helper/src");
    assert!(
        imports.len() > 30 && imports["session::allocation"].contains("host::record"),
        "{imports:#?}"
    );
    for (from, to) in &imports {
        for to in to {
            assert!(floor(from) <= floor(to), "{from} imports {to}, which is above it");
        }
    }
}

#[test]
fn no_module_imports_one_that_imports_it() {
    for sources in ["helper/src", "protocol/src"] {
        no_module_of(sources);
    }
}

fn no_module_of(sources: &str) {
    let mut left = imports(sources);
    // Take away what imports nothing that is left, until nothing more can be.
    loop {
        let names: BTreeSet<String> = left.keys().cloned().collect();
        let before = left.len();
        left.retain(|_, to| to.iter().any(|to| names.contains(to)));
        if left.len() == before {
            break;
        }
    }
    let names: BTreeSet<String> = left.keys().cloned().collect();
    for to in left.values_mut() {
        to.retain(|to| names.contains(to));
    }
    assert!(
        left.is_empty(),
        "these import each other, or lead to some that do: {left:#?}"
    );
}
