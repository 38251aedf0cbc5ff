//! What the documents say is true: every TOML example in them is a configuration without mistakes.

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
