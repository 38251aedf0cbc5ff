//! The pages of the workspace, parsed as Markdown: headings, links, tables, code.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use pulldown_cmark::{CodeBlockKind, Event, Options, Parser, Tag, TagEnd};

use crate::sources::{read, root};

/// A link or an image.
#[derive(Clone, Debug, Default)]
pub struct Link {
    /// Without marks: `mod.rs` where the page has it between backticks.
    pub text: String,
    /// As written: a URL, or a path from the page's directory, perhaps with `#` and the anchor of a heading.
    pub target: String,
}

/// A cell of a table.
#[derive(Clone, Debug, Default)]
pub struct Cell {
    /// Without marks, with the text of links.
    pub text: String,
    /// What is between backticks, apart from the text of links.
    pub words: Vec<String>,
    /// In the order of the text.
    pub links: Vec<Link>,
}

/// The row of headings first.
pub type Table = Vec<Vec<Cell>>;

/// A heading, and what is between it and the next one of any level.
#[derive(Clone, Debug, Default)]
struct Section {
    /// 1 to 6; 0 before the first heading.
    level: usize,
    heading: String,
    links: Vec<Link>,
    words: Vec<String>,
    /// Blocks of code, with their language.
    blocks: Vec<(String, String)>,
    tables: Vec<Table>,
}

/// A page, or one section of it.
#[derive(Clone, Debug)]
pub struct Page {
    /// From the workspace's directory.
    pub path: PathBuf,
    sections: Vec<Section>,
}

impl Page {
    /// # Panics
    ///
    /// If there is no such file.
    pub fn read(path: impl AsRef<Path>) -> Page {
        Page::parse(&path, &read(&path))
    }

    /// A page that this text would be at this path.
    pub fn parse(path: impl AsRef<Path>, text: &str) -> Page {
        let mut sections = vec![Section::default()];
        let (mut in_heading, mut in_block) = (false, false);
        let mut cell: Option<Cell> = None;
        // An image may be in a link.
        let mut open: Vec<Link> = Vec::new();
        for event in Parser::new_ext(text, Options::ENABLE_TABLES) {
            if let Event::Start(Tag::Heading { level, .. }) = event {
                in_heading = true;
                sections.push(Section {
                    level: level as usize,
                    ..Section::default()
                });
            }
            let section = sections.last_mut().expect("there is one from the beginning");
            match event {
                Event::End(TagEnd::Heading(_)) => in_heading = false,
                Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => open.push(Link {
                    target: dest_url.into_string(),
                    ..Link::default()
                }),
                Event::End(TagEnd::Link | TagEnd::Image) => {
                    let link = open.pop().expect("a link has begun");
                    if let Some(cell) = &mut cell {
                        cell.links.push(link.clone());
                    }
                    section.links.push(link);
                }
                Event::Start(Tag::CodeBlock(kind)) => {
                    let language = match kind {
                        CodeBlockKind::Fenced(language) => language.into_string(),
                        CodeBlockKind::Indented => String::new(),
                    };
                    section.blocks.push((language, String::new()));
                    in_block = true;
                }
                Event::End(TagEnd::CodeBlock) => in_block = false,
                Event::Start(Tag::Table(_)) => section.tables.push(Table::new()),
                Event::Start(Tag::TableHead | Tag::TableRow) => {
                    section
                        .tables
                        .last_mut()
                        .expect("a table has begun")
                        .push(Vec::new());
                }
                Event::Start(Tag::TableCell) => cell = Some(Cell::default()),
                Event::End(TagEnd::TableCell) => {
                    let row = section.tables.last_mut().and_then(|table| table.last_mut());
                    row.expect("a row has begun").extend(cell.take());
                }
                Event::Text(text) if in_block => {
                    section
                        .blocks
                        .last_mut()
                        .expect("a block has begun")
                        .1
                        .push_str(&text);
                }
                Event::Text(ref text) | Event::Code(ref text) => {
                    if in_heading {
                        section.heading.push_str(text);
                    }
                    for link in &mut open {
                        link.text.push_str(text);
                    }
                    let is_word = matches!(event, Event::Code(_)) && open.is_empty();
                    if is_word {
                        section.words.push(text.to_string());
                    }
                    if let Some(cell) = &mut cell {
                        cell.text.push_str(text);
                        cell.words.extend(is_word.then(|| text.to_string()));
                    }
                }
                Event::SoftBreak | Event::HardBreak => {
                    for link in &mut open {
                        link.text.push(' ');
                    }
                }
                _ => {}
            }
        }
        Page {
            path: path.as_ref().into(),
            sections,
        }
    }

    /// Every page in the workspace, fixtures apart.
    ///
    /// # Panics
    ///
    /// If the workspace cannot be read.
    pub fn all() -> Vec<Page> {
        let mut found = Vec::new();
        let mut waiting = vec![PathBuf::new()];
        while let Some(directory) = waiting.pop() {
            for entry in fs::read_dir(root().join(&directory))
                .expect("a directory of the workspace")
                .flatten()
            {
                let path = directory.join(entry.file_name());
                let kind = entry.file_type().expect("an entry has a type");
                let is_left_out = ["target", ".git", "corpus"]
                    .iter()
                    .any(|name| path.ends_with(name));
                if kind.is_dir() && !is_left_out {
                    waiting.push(path);
                } else if kind.is_file() && path.extension().is_some_and(|end| end == "md") {
                    found.push(Page::read(&path));
                }
            }
        }
        assert!(found.len() > 10, "the pages are not found");
        found
    }

    /// What is below this heading, up to the next of its level or above, as a page.
    ///
    /// # Panics
    ///
    /// If there is no such heading.
    pub fn section(&self, heading: &str) -> Page {
        let mut from = self.sections.iter().skip_while(|it| it.heading != heading);
        let first = from
            .next()
            .unwrap_or_else(|| panic!("{} has no heading {heading}", self.path.display()));
        let below = from.take_while(|it| it.level > first.level);
        Page {
            path: self.path.clone(),
            sections: std::iter::once(first).chain(below).cloned().collect(),
        }
    }

    /// All links and images.
    pub fn links(&self) -> impl Iterator<Item = &Link> {
        self.sections.iter().flat_map(|it| &it.links)
    }

    /// What is between backticks, apart from the text of links.
    pub fn words(&self) -> impl Iterator<Item = &str> {
        self.sections.iter().flat_map(|it| &it.words).map(String::as_str)
    }

    /// All tables.
    pub fn tables(&self) -> impl Iterator<Item = &Table> {
        self.sections.iter().flat_map(|it| &it.tables)
    }

    /// The rows of all tables, without the rows of headings.
    pub fn rows(&self) -> impl Iterator<Item = &[Cell]> {
        self.tables().flat_map(|table| &table[1..]).map(Vec::as_slice)
    }

    /// The blocks of code of this language.
    pub fn blocks(&self, language: &str) -> impl Iterator<Item = &str> {
        let blocks = self.sections.iter().flat_map(|it| &it.blocks);
        blocks.filter_map(move |(own, text)| (own == language).then_some(text.as_str()))
    }

    /// What is typed as root in its console blocks, without comments.
    pub fn commands(&self) -> Vec<String> {
        let text = self.blocks("console").collect::<String>().replace("\\\n", " ");
        let typed = text.lines().filter_map(|line| line.strip_prefix("# "));
        typed
            .map(|line| line.split(" # ").next().unwrap_or_default().trim().to_owned())
            .collect()
    }

    /// The anchors of its headings, as forges make them.
    pub fn anchors(&self) -> BTreeSet<String> {
        let anchor = |heading: &str| -> String {
            let lower = heading.trim().to_lowercase().replace(' ', "-");
            let kept = lower
                .chars()
                .filter(|c| c.is_alphanumeric() || matches!(c, '-' | '_'));
            kept.collect()
        };
        self.sections.iter().map(|it| anchor(&it.heading)).collect()
    }
}
