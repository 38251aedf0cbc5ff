//! SECURITY.md, docs/review.md and docs/architecture.md are for readers who trust none of them, so what can be checked
//! in them is: each reference leads to a file that has what it names, each test that is named exists, and the tables have
//! everything that the code has, and nothing else. (That files and headings are there, `docs.rs` checks.) It reads files, and needs no root.

use std::collections::{BTreeMap, BTreeSet};

use testbed::pages::{Cell, Link, Page};
use testbed::sources::{code, crates_of_the_helper, files, is_a_test, read};

const PAGES: [&str; 3] = ["SECURITY.md", "docs/review.md", "docs/architecture.md"];
const REVIEW: &str = "docs/review.md";

fn fail_with(mistakes: Vec<String>) {
    assert!(mistakes.is_empty(), "\n{}", mistakes.join("\n"));
}

/// The names in the first column of a section's tables, each there once.
fn first_column(heading: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for row in Page::read(REVIEW).section(heading).rows() {
        let here = &row[0].words;
        assert!(!here.is_empty(), "{heading}: a row names nothing: {row:?}");
        assert!(
            row.iter().all(|cell| !cell.text.is_empty()),
            "{heading}: a cell is empty: {row:?}"
        );
        for name in here {
            assert!(names.insert(name.clone()), "{heading}: {name} is there twice");
        }
    }
    names
}

fn assert_same(heading: &str, page: &BTreeSet<String>, code: &BTreeSet<String>) {
    assert!(!code.is_empty(), "nothing was found in the code for {heading}");
    let missing: Vec<_> = code.difference(page).collect();
    let surplus: Vec<_> = page.difference(code).collect();
    assert!(
        missing.is_empty() && surplus.is_empty(),
        "{REVIEW}, {heading}: missing {missing:?}, not in the code {surplus:?}"
    );
}

// References

fn is_part_of_a_name(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && text.chars().all(is_part_of_a_name)
}

/// Is this name defined here? A macro of this project takes a type's name on a line of its own.
fn defines(line: &str, name: &str) -> bool {
    let line = line.trim_start();
    if line.strip_suffix(',') == Some(name) {
        return true;
    }
    let keywords = ["fn", "struct", "enum", "trait", "const", "type"];
    keywords.iter().any(|keyword| {
        let definition = format!("{keyword} {name}");
        line.match_indices(&definition).any(|(at, _)| {
            let after = line[at + definition.len()..].chars().next();
            (at == 0 || line[..at].ends_with(' ')) && !after.is_some_and(is_part_of_a_name)
        })
    })
}

/// What a reference to a source names that is not defined there. A definition is one of Rust's, a variant, or, for what is
/// no name, the text itself.
fn undefined(page: &Page) -> (Vec<String>, usize) {
    let beside = page.path.parent().expect("a page is in a folder");
    let mut mistakes = Vec::new();
    let mut count = 0;
    for link in page.links() {
        let item = link.text.as_str();
        if !link.target.ends_with(".rs") || link.target.contains("://") || item.ends_with(".rs") {
            continue;
        }
        count += 1;
        let text = read(beside.join(&link.target));
        let name = item.rsplit("::").next().unwrap_or(item);
        let is_defined = |line: &str| {
            let variant = line.trim_start().strip_prefix(name);
            defines(line, name)
                || variant.is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '(', ',', ':']))
        };
        let is_there = match is_name(name) {
            true => code(&text).any(is_defined),
            false => text.contains(item),
        };
        if !is_there {
            mistakes.push(format!("there is no {item} in {}", link.target));
        }
    }
    (mistakes, count)
}

#[test]
fn every_item_that_is_referred_to_is_in_its_file() {
    let mut wrong = Vec::new();
    let mut all = 0;
    for name in PAGES {
        let (mistakes, count) = undefined(&Page::read(name));
        all += count;
        wrong.extend(mistakes.iter().map(|mistake| format!("{name}: {mistake}")));
    }
    assert!(all > 100, "the pages have only {all} references");
    fail_with(wrong);
    let text = "[`review::undefined`](review.rs), [`no_such`](review.rs) and [`review.rs`](review.rs).";
    let (mistakes, count) = undefined(&Page::parse("tests/tests/page.md", text));
    assert_eq!((mistakes.len(), count), (1, 2), "{mistakes:?}");
}

#[test]
fn the_guide_names_every_file_of_the_helper() {
    let guide = Page::read(REVIEW).section("A request, step by step");
    let led: BTreeSet<&str> = guide
        .links()
        .filter_map(|link| link.target.strip_prefix("../")?.split('#').next())
        .collect();
    let files = [files("protocol/src"), files("helper/src")].concat();
    assert!(files.len() > 20, "{files:?}");
    let missing: Vec<_> = files
        .iter()
        .filter(|file| !led.contains(file.to_str().expect("a plain name")))
        .collect();
    assert!(missing.is_empty(), "{REVIEW} does not lead through {missing:?}");
}

// Tests

/// Is this how a test's name looks? Types and constants have capitals; and functions are named in links.
fn looks_like_a_test(word: &str) -> bool {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    word.contains("::")
        && word
            .split("::")
            .all(|part| !part.is_empty() && part.chars().all(plain))
}

#[test]
fn every_test_that_is_named_exists() {
    let mut mistakes = Vec::new();
    for page in ["SECURITY.md", REVIEW] {
        let text = Page::read(page);
        let named: BTreeSet<&str> = text.words().filter(|word| looks_like_a_test(word)).collect();
        assert!(named.len() > 20, "{page} names only {named:?}");
        let missing = named.iter().filter(|name| !is_a_test(name));
        mistakes.extend(missing.map(|name| format!("{page}: there is no test {name} that is run")));
    }
    fail_with(mistakes);
}

/// Each row of this section's tables has a test in its last cell.
fn each_row_has_a_test(page: &str, heading: &str, at_least: usize) -> Vec<String> {
    let section = Page::read(page).section(heading);
    let rows: Vec<&[Cell]> = section.rows().collect();
    assert!(
        rows.len() >= at_least,
        "{page}, {heading}: only {} rows",
        rows.len()
    );
    let without = rows.iter().filter(|row| {
        let last = row.last().expect("a row has cells");
        !last.words.iter().any(|word| looks_like_a_test(word))
    });
    without
        .map(|row| format!("{page}, {heading}: no test shows {:?}", row[0].text))
        .collect()
}

#[test]
fn every_guarantee_and_every_check_has_a_test() {
    let mut mistakes = each_row_has_a_test("SECURITY.md", "What is guaranteed", 20);
    mistakes.extend(each_row_has_a_test(REVIEW, "What root touches", 20));
    for row in Page::read(REVIEW).section("What root touches").rows() {
        let mut links = row.iter().flat_map(|cell| &cell.links);
        if !links.any(|link| link.target.ends_with(".rs")) {
            mistakes.push(format!(
                "{REVIEW}: no line of code is named for {:?}",
                row[0].text
            ));
        }
    }
    fail_with(mistakes);
}

// Tables

/// What functions of a source have lines of this kind, and how many.
fn functions_with(text: &str, count: impl Fn(&str) -> usize) -> BTreeMap<String, usize> {
    let mut found = BTreeMap::new();
    let mut function = "";
    for line in code(text) {
        if let Some((before, rest)) = line.split_once("fn ")
            && before
                .chars()
                .all(|c| c.is_ascii_lowercase() || " ()".contains(c))
        {
            function = rest.split(['(', '<']).next().unwrap_or_default();
        }
        let here = count(line);
        if here > 0 {
            *found.entry(function.to_owned()).or_default() += here;
        }
    }
    found
}

/// The function that a reference leads to, with its file.
fn function_of(link: &Link) -> (String, String) {
    let file = link.target.trim_start_matches("../");
    let name = link.text.rsplit("::").next().unwrap_or_default();
    (file.to_owned(), name.to_owned())
}

#[test]
fn the_table_of_what_removes_files_has_every_function_that_does() {
    const HEADING: &str = "Can a job make root delete a file of mine?";
    let calls = [
        "remove_file(",
        "remove_dir(",
        "remove_dir_all(",
        "unlink(",
        "unlinkat(",
    ];
    let removes = |line: &str| calls.iter().filter(|call| line.contains(*call)).count();
    let mut code = BTreeSet::new();
    for file in files("helper/src") {
        for function in functions_with(&read(&file), removes).into_keys() {
            code.insert(format!("{}: {function}", file.display()));
        }
    }
    let mut page = BTreeSet::new();
    for row in Page::read(REVIEW).section(HEADING).rows() {
        assert!(
            !row[0].links.is_empty(),
            "{HEADING}: a row refers to nothing: {row:?}"
        );
        let functions = row[0].links.iter().map(function_of);
        page.extend(functions.map(|(file, function)| format!("{file}: {function}")));
    }
    assert_same(HEADING, &page, &code);
}

#[test]
fn the_table_of_unsafe_blocks_has_them_all() {
    const HEADING: &str = "All that is unsafe";
    let blocks = |line: &str| {
        let words = line.split(|c| !is_part_of_a_name(c));
        words.filter(|word| *word == "unsafe").count()
    };
    let mut code = BTreeMap::new();
    for file in [files("helper/src"), files("protocol/src")].concat() {
        for (function, count) in functions_with(&read(&file), blocks) {
            code.insert((file.to_string_lossy().into_owned(), function), count);
        }
    }
    assert!(code.len() > 10, "{code:?}");
    let mut page = BTreeMap::new();
    for row in Page::read(REVIEW).section(HEADING).rows() {
        let link = row[0].links.last().expect("the first cell is a reference");
        assert!(row[2].text.len() > 20, "there is no argument in {row:?}");
        let blocks: usize = row[1].text.parse().expect("a number of blocks");
        let before = page.insert(function_of(link), blocks);
        assert!(before.is_none(), "{HEADING}: {} is there twice", link.text);
    }
    let of = |(file, function): &(String, String), blocks: usize| format!("{file}: {function}: {blocks}");
    let lines = |map: &BTreeMap<(String, String), usize>| map.iter().map(|(key, n)| of(key, *n)).collect();
    assert_same(HEADING, &lines(&page), &lines(&code));
}

#[test]
fn the_table_of_crates_has_the_helpers_whole_tree() {
    const HEADING: &str = "Every crate";
    let crates = crates_of_the_helper();
    assert!(crates.contains("nix"), "{crates:?}");
    assert_same(HEADING, &first_column(HEADING), &crates);
}

/// The names with this beginning in the code of the constant's list.
fn list(file: &str, constant: &str, prefix: &str) -> BTreeSet<String> {
    let text = read(file);
    let body: Vec<&str> = code(&text)
        .skip_while(|line| !line.starts_with(&format!("const {constant}:")))
        .take_while(|line| *line != "];")
        .collect();
    assert!(body.len() > 1, "{file} has no list {constant}");
    let words = body.iter().flat_map(|line| line.split(|c| !is_part_of_a_name(c)));
    let names = words.filter(|word| word.starts_with(prefix)).map(str::to_owned);
    names.collect()
}

/// The texts of the rows of a section's tables.
fn texts(heading: &str) -> Vec<Vec<String>> {
    let section = Page::read(REVIEW).section(heading);
    let rows = section.rows();
    rows.map(|row| row.iter().map(|cell| cell.text.clone()).collect())
        .collect()
}

#[test]
fn the_tables_of_privileges_are_those_of_the_code() {
    use helper::{CAPABILITIES, ProcessKind};
    let lower = |name: &dyn std::fmt::Debug| format!("{name:?}").to_lowercase();

    const HEADING: &str = "Every capability";
    let page = texts(HEADING);
    let mut code = Vec::new();
    for (capability, _, why) in &CAPABILITIES {
        let keep = ProcessKind::ALL
            .iter()
            .filter(|kind| kind.capabilities().contains(capability));
        let keep: Vec<String> = keep.map(|kind| lower(kind)).collect();
        code.push(vec![
            capability.to_string(),
            keep.join(", "),
            why.replace('`', ""),
        ]);
    }
    assert_eq!(page, code, "{REVIEW}, {HEADING}");

    const KINDS: &str = "Every kind of process";
    let page = texts(KINDS);
    let code = ProcessKind::ALL.map(|kind| {
        let filters: Vec<String> = kind.filters().iter().map(|filter| lower(filter)).collect();
        [
            lower(&kind),
            kind.capabilities().len().to_string(),
            filters.join(", "),
        ]
    });
    assert_eq!(page.len(), code.len(), "{KINDS}: {page:?}");
    for (row, code) in page.iter().zip(&code) {
        assert_eq!(
            [&row[0], &row[2], &row[3]].map(String::as_str),
            code.each_ref().map(String::as_str),
            "{KINDS}"
        );
    }
}

#[test]
fn the_tables_of_system_calls_have_the_filters_lists() {
    let file = "helper/src/privileges/seccomp/mod.rs";
    let text = read(file);
    let by_rule = |function: &str| {
        let body = text.split_once(function).expect("a function of the filter").1;
        let body = body.split("\n}\n").next().unwrap_or_default();
        let words = body.split(|c| !is_part_of_a_name(c));
        let calls = words.filter(|word| word.starts_with("SYS_")).map(str::to_owned);
        calls.collect::<BTreeSet<_>>()
    };
    let mut allowed = list(file, "SESSION", "SYS_");
    allowed.extend(by_rule("pub fn session("));
    let heading = "What a session may call";
    assert_same(heading, &first_column(heading), &allowed);
    let lists = ["NEVER", "UNAVAILABLE", "OF_NAMESPACES"];
    let mut refused: BTreeSet<String> = lists.iter().flat_map(|name| list(file, name, "SYS_")).collect();
    // Lists of one; of those that are newer than the C library, the constants of ours.
    refused.extend(["SYS_name_to_handle_at", "OPEN_TREE_ATTR", "FILE_SETATTR"].map(str::to_owned));
    let heading = "What a job is refused";
    assert_same(heading, &first_column(heading), &refused);
    // What its rules name outside the lists.
    let functions = [
        "pub fn job(",
        "fn refuse_filters(",
        "fn keep_limits(",
        "fn keep_pid_1(",
    ];
    let by_argument = functions.iter().flat_map(|function| by_rule(function)).collect();
    let heading = "What a job may call in part";
    assert_same(heading, &first_column(heading), &by_argument);
    let heading = "Calls that succeed and do nothing";
    assert_same(heading, &first_column(heading), &list(file, "SYNC", "SYS_"));
}
