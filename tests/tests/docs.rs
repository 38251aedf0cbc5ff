//! What the documents say is true: every TOML example in them is a configuration without mistakes, and the table of
//! the configuration's keys has them all.

use std::collections::BTreeSet;
use std::path::Path;

use protocol::config::Config;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the workspace")
}

#[test]
fn every_toml_example_is_a_good_configuration() {
    let mut examples = vec![std::fs::read_to_string(root().join("packaging/config.toml")).unwrap()];
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let blocks = readme
        .split("```toml\n")
        .skip(1)
        .map(|rest| rest.split("```").next().unwrap().to_owned());
    examples.extend(blocks);
    assert!(examples.len() >= 2, "the README has no example");
    for example in examples {
        if let Err(mistakes) = Config::parse(&example) {
            panic!("{mistakes:?} in\n{example}");
        }
    }
}

/// The keys that the parser knows in one table, by its own words on one that it does not know.
fn keys_in(table: &str, prefix: &str) -> Vec<String> {
    let base = "[general]\nbaseurl = \"http://h\"\n[factory]\ntoken_file = \"/t\"\n[slots.a]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n";
    let text = match base.split_once(table) {
        Some((before, after)) => format!("{before}{table}colour = 1\n{after}"),
        None => format!("{base}{table}colour = 1\n"),
    };
    let mistakes = Config::parse(&text).expect_err("colour is no key");
    let known = mistakes[0]
        .message
        .split_once("expected")
        .expect("the parser says what it expected")
        .1;
    let names = known.split('`').skip(1).step_by(2);
    names.map(|name| format!("{prefix}{name}")).collect()
}

#[test]
fn the_table_has_every_key_of_the_configuration_and_no_other() {
    let mut known: BTreeSet<String> = BTreeSet::new();
    for (table, prefix) in [
        ("[general]\n", "general."),
        ("[factory]\n", "factory."),
        ("[slots.a]\n", "slots.NAME."),
        ("[slots.a.limits]\n", "slots.NAME.limits."),
    ] {
        known.extend(keys_in(table, prefix));
    }
    known.remove("slots.NAME.limits");
    let page = std::fs::read_to_string(root().join("docs/configuration.md")).unwrap();
    let rows = page
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    let written: BTreeSet<String> = rows.map(str::to_owned).collect();
    assert!(known.len() > 30, "{known:?}");
    assert_eq!(known, written);
    let example = std::fs::read_to_string(root().join("packaging/config.toml")).unwrap();
    for key in known {
        let name = key.rsplit('.').next().unwrap();
        assert!(
            example.contains(name),
            "packaging/config.toml does not show {key}"
        );
    }
}
