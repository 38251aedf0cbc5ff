//! docs/evidence/attacks.md has a line for every attack, and what it names is there.

use std::collections::BTreeMap;
use std::fs;

use testbed::pages::{Cell, Page};
use testbed::sources::{is_a_test, root, tests_in};

/// The rows that must be there: groups A to F, H, J and K. Group G, accidents, is in docs/evidence/accidents.md, and group I, hosts, in
/// docs/hosts.md.
const ROWS: [std::ops::RangeInclusive<u32>; 2] = [1..=72, 86..=142];
/// What begins a cell that names no test.
const ELSEWHERE: &str = "needs another host: ";

/// The cell of each row that says what shows it.
fn table() -> BTreeMap<u32, Cell> {
    let page = Page::read("docs/evidence/attacks.md");
    let mut rows = BTreeMap::new();
    for cells in page.rows() {
        let row: u32 = cells[0].text.parse().expect("a row begins with its number");
        assert!(
            cells.iter().all(|cell| !cell.text.is_empty()),
            "row {row} has an empty cell"
        );
        let before = rows.insert(row, cells[3].clone());
        assert!(before.is_none(), "row {row} is there twice");
    }
    rows
}

#[test]
fn every_row_is_there_once_and_shown_by_tests_that_exist_or_says_why_not() {
    let table = table();
    let required = table.keys().copied();
    assert_eq!(
        required.collect::<Vec<_>>(),
        ROWS.into_iter().flatten().collect::<Vec<_>>()
    );
    let mut mistakes = Vec::new();
    for (row, cell) in &table {
        for name in cell.words.iter().filter(|name| !is_a_test(name)) {
            mistakes.push(format!("row {row}: there is no test {name}"));
        }
        let reason = cell.text.split_once(ELSEWHERE).map(|(_, reason)| reason);
        if cell.words.is_empty() && reason.is_none_or(|reason| reason.split_whitespace().count() < 5) {
            mistakes.push(format!("row {row} names neither a test nor a reason"));
        }
    }
    assert!(mistakes.is_empty(), "{}", mistakes.join("\n"));
}

#[test]
fn every_test_of_an_attack_is_in_its_row() {
    let table = table();
    let mut count = 0;
    let mut mistakes = Vec::new();
    for entry in fs::read_dir(root().join("tests/tests/attacks"))
        .expect("attacks are there")
        .flatten()
    {
        let path = entry.path();
        let module = path
            .file_stem()
            .expect("a file has a name")
            .to_string_lossy()
            .into_owned();
        for function in tests_in(&path) {
            count += 1;
            let row = function
                .strip_prefix("row_")
                .and_then(|rest| rest.split('_').next()?.parse::<u32>().ok());
            let name = format!("attacks::{module}::{function}");
            match row.and_then(|row| table.get(&row)) {
                Some(cell) if cell.words.contains(&name) => {}
                _ => mistakes.push(format!("{name} is not named in its row")),
            }
        }
    }
    assert!(count > 0, "there are no attacks");
    assert!(mistakes.is_empty(), "{}", mistakes.join("\n"));
}
