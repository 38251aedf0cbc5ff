//! The helper stays small enough to be read: what it is made of is counted, and no more than budgets.toml says.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;
use syn::Item;
use testbed::sources::{code, crates_of, crates_of_the_helper, files, read};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Budget {
    limit: usize,
    reason: String,
}

fn allow(what: &str, count: usize) {
    let mut budgets: BTreeMap<String, Budget> = toml::from_str(&read("budgets.toml")).unwrap();
    let budget = budgets.remove(what).expect("a budget of this name");
    assert!(
        !budget.reason.trim().is_empty(),
        "{what} has a limit without a reason"
    );
    println!("{what}: {count} of {}", budget.limit);
    let limit = budget.limit;
    assert!(
        count <= limit,
        "{what}: {count}, but the budget is {limit}: delete something, or raise it in budgets.toml with the reason"
    );
}

/// The sources of both crates.
fn sources() -> Vec<PathBuf> {
    [files("protocol/src"), files("helper/src")].concat()
}

/// Which budget the lines of a file are of: by what a process that runs them may do.
fn budget_of(file: &Path) -> &'static str {
    match file
        .strip_prefix("helper/src")
        .ok()
        .and_then(|path| path.iter().next()?.to_str())
    {
        Some("manual") => "manual",
        Some("unprivileged") => "unprivileged",
        _ => "privileged",
    }
}

#[test]
fn each_kind_of_code_has_few_lines() {
    let mut lines = BTreeMap::from([("manual", 0), ("privileged", 0), ("unprivileged", 0)]);
    for file in sources() {
        let text = read(&file);
        let count = code(&text).count();
        println!("{count:>5} {}", file.display());
        *lines.get_mut(budget_of(&file)).unwrap() += count;
        // They would bring in what is not counted.
        for other in ["#[path", "include!(", "include_str!("] {
            assert!(
                !code(&text).any(|line| line.contains(other)),
                "{}: {other}",
                file.display()
            );
        }
    }
    for (what, count) in lines {
        allow(what, count);
    }
}

#[test]
fn what_is_unsafe_is_in_one_file_of_each_crate_and_little() {
    let mut all = 0;
    for file in sources() {
        let text = read(&file);
        let words = code(&text).flat_map(|line| line.split(|c: char| !(c.is_alphanumeric() || c == '_')));
        let count = words.filter(|word| *word == "unsafe").count();
        assert!(
            count == 0 || file.ends_with("src/sys.rs"),
            "{} has {count} times unsafe: that is for sys.rs",
            file.display()
        );
        all += count;
    }
    assert!(all > 0, "nothing was counted");
    allow("unsafe", all);
}

#[test]
fn the_supervisor_can_ask_for_few_things() {
    let file = syn::parse_file(&read("protocol/src/message.rs")).unwrap();
    let requests = file.items.iter().find_map(|item| match item {
        Item::Enum(it) if it.ident == "Request" => Some(it.variants.len()),
        _ => None,
    });
    allow("requests", requests.expect("the requests are there"));
}

#[test]
fn the_helper_is_made_of_few_crates_each_with_its_reason() {
    let crates = crates_of_the_helper();
    for heavy in [
        "tokio", "hyper", "reqwest", "rustls", "openssl", "axum", "rusqlite", "regex",
    ] {
        assert!(
            !crates.iter().any(|name| name.split('-').next() == Some(heavy)),
            "the helper links {heavy}"
        );
    }
    // cargo-deny sees to it that no other crate comes in; here, that the list has no line too many.
    let list: toml::Table = toml::from_str(&read("helper/deny.toml")).unwrap();
    let listed: BTreeSet<String> = list["bans"]["allow"]
        .as_array()
        .unwrap()
        .iter()
        .map(|line| {
            assert!(
                line["reason"].as_str().is_some_and(|reason| !reason.is_empty()),
                "{line:?}"
            );
            line["crate"].as_str().unwrap().to_owned()
        })
        .collect();
    assert_eq!(
        listed, crates,
        "helper/deny.toml lists other crates than the helper is made of"
    );
    allow("crates", crates.len());
}

/// Otherwise most crates would be built once more for each of the other commands.
#[test]
fn all_tests_one_crates_tests_and_the_demo_are_built_of_the_same() {
    let built_of = |packages, edges| crates_of(&[packages], edges, "{p} {f}");
    let all = built_of("--workspace", "normal,dev,build");
    for (packages, edges) in [
        ("--package=testbed", "normal,dev,build"),
        ("--package=testbed", "normal,build"),
        ("--workspace", "normal,build"),
    ] {
        let some = built_of(packages, edges);
        let others = some.difference(&all).collect::<Vec<_>>();
        assert!(
            others.is_empty(),
            "{packages} has crates with other features: add these to tests/Cargo.toml: {others:#?}"
        );
    }
}

/// A sentence that only the program of the manual commands has, and one that only the helper has.
#[test]
fn the_helpers_program_has_no_code_of_the_manual_commands() {
    let (manual, monitor) = ("there is no command: write it behind --", "must run as root");
    for (program, has, lacks) in [
        ("user-factory-helper", monitor, manual),
        ("user-factory-manual", manual, monitor),
    ] {
        let bytes = fs::read(testbed::harness::binaries().join(program)).unwrap();
        let is_in = |text: &str| bytes.windows(text.len()).any(|part| part == text.as_bytes());
        assert!(is_in(has) && !is_in(lacks), "{program}");
    }
}

#[test]
fn the_helper_links_the_c_library_and_no_other() {
    let program = testbed::harness::binaries().join("user-factory-helper");
    let output = Command::new("readelf")
        .arg("--dynamic")
        .arg(&program)
        .output()
        .expect("readelf can be started");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let output = String::from_utf8_lossy(&output.stdout);
    let mut libraries = BTreeSet::new();
    for line in output.lines().filter(|line| line.contains("(NEEDED)")) {
        libraries.insert(line.split(['[', ']']).nth(1).expect("a name in brackets"));
    }
    // The second unwinds the stack after a panic; the third loads the others.
    let known = BTreeSet::from([
        "libc.so.6",
        "libgcc_s.so.1",
        "ld-linux-x86-64.so.2",
        "ld-linux-aarch64.so.1",
    ]);
    assert!(
        libraries.contains("libc.so.6") && libraries.is_subset(&known),
        "{libraries:?}"
    );
}

#[test]
fn a_line_counts_that_is_code_and_comes_before_the_tests() {
    let text = "//! Documentation.\n\n/// More of it.\n#[derive(Debug)]\nstruct A; // a comment\n    // why\n\n\
                fn f() {\n    g()\n}\n#[cfg(test)]\nmod tests {\n}\n";
    let lines: Vec<_> = code(text).collect();
    assert_eq!(
        lines,
        [
            "#[derive(Debug)]",
            "struct A; // a comment",
            "fn f() {",
            "    g()",
            "}"
        ]
    );
}
