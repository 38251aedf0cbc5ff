//! What tests read of the workspace's own files: sources, the tests in them, and the crates of the helper.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock, PoisonError};

use syn::{Attribute, Item, ItemFn};

/// The workspace's directory: where this was built, or what the environment variable `TESTBED_SOURCES` names
/// (see `tests/machine`).
pub fn root() -> &'static Path {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    ROOT.get_or_init(|| match std::env::var_os("TESTBED_SOURCES") {
        Some(root) => root.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .expect("the workspace")
            .to_owned(),
    })
}

/// A file of the workspace.
pub fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Every source below this folder, as a path from the workspace's directory, in order.
pub fn files(folder: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder of sources") {
            let path = entry.expect("a folder can be read").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|end| end == "rs") {
                found.push(path.strip_prefix(root()).expect("it is below").to_owned());
            }
        }
    }
    found.sort();
    found
}

/// The lines of a source before its tests, without blank ones and those that begin with `//`.
pub fn code(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .take_while(|line| *line != "#[cfg(test)]")
        .filter(|line| !line.trim().is_empty() && !line.trim_start().starts_with("//"))
}

/// Is the item with these attributes compiled for tests only?
pub fn is_for_tests(attributes: &[Attribute]) -> bool {
    attributes
        .iter()
        .any(|it| it.path().is_ident("cfg") && it.parse_args::<syn::Ident>().is_ok_and(|word| word == "test"))
}

/// Is this function a test that is run somewhere: by itself, or in a machine that a scenario of `tests/machine` boots?
fn is_run(function: &ItemFn) -> bool {
    let last = |it: &Attribute, name: &str| it.path().segments.last().is_some_and(|part| part.ident == name);
    let ignored = function.attrs.iter().find(|it| last(it, "ignore"));
    let is_run = ignored.is_none_or(|attribute| match &attribute.meta {
        syn::Meta::NameValue(it) => match &it.value {
            syn::Expr::Lit(syn::ExprLit {
                lit: syn::Lit::Str(reason),
                ..
            }) => is_in_a_scenario(&reason.value()),
            _ => false,
        },
        _ => false,
    });
    is_run && function.attrs.iter().any(|it| last(it, "test"))
}

/// Does this reason name a scenario of `tests/machine` that runs tests which are left out elsewhere?
fn is_in_a_scenario(reason: &str) -> bool {
    let Some((_, scenario)) = reason.split_once("tests/machine/run ") else {
        return false;
    };
    let scenario = scenario.split(' ').next().unwrap_or_default();
    assert!(
        read(Path::new("tests/machine/scenarios").join(scenario)).contains("-ignored"),
        "the scenario {scenario} runs no test that is ignored"
    );
    true
}

/// The tests of a source that are run, by the names of their functions. None where there is no such file.
pub fn tests_in(path: impl AsRef<Path>) -> BTreeSet<String> {
    // Pages name hundreds of tests of the same files.
    static KNOWN: Mutex<BTreeMap<PathBuf, BTreeSet<String>>> = Mutex::new(BTreeMap::new());
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let path = path.as_ref();
    known
        .entry(path.to_owned())
        .or_insert_with(|| parse_tests(path))
        .clone()
}

fn parse_tests(path: &Path) -> BTreeSet<String> {
    let Ok(text) = fs::read_to_string(root().join(path)) else {
        return BTreeSet::new();
    };
    let file = syn::parse_file(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut found = BTreeSet::new();
    let mut items: Vec<&Item> = file.items.iter().collect();
    while let Some(item) = items.pop() {
        match item {
            Item::Mod(it) => items.extend(it.content.iter().flat_map(|(_, items)| items)),
            Item::Fn(it) if is_run(it) => {
                found.insert(it.sig.ident.to_string());
            }
            // The functions of a `proptest!` have no syntax that `syn` knows.
            Item::Macro(it) if it.mac.path.is_ident("proptest") => {
                let tokens: Vec<String> = it
                    .mac
                    .tokens
                    .clone()
                    .into_iter()
                    .map(|token| token.to_string())
                    .collect();
                let names = tokens.windows(2).filter(|two| two[0] == "fn");
                found.extend(names.map(|two| two[1].clone()));
            }
            _ => {}
        }
    }
    found
}

/// Is there a test of this name that is run? `module::test` is of this crate; what begins with the name of another
/// member of the workspace is in that member, in a module before `tests` or in a program of its `tests` folder.
pub fn is_a_test(name: &str) -> bool {
    let Some((path, function)) = name.rsplit_once("::") else {
        return false;
    };
    let path = path.strip_suffix("::tests").unwrap_or(path);
    let folders = match path.split_once("::") {
        Some((member @ ("helper" | "protocol" | "supervisor"), module)) => ["src", "tests"]
            .map(|place| Path::new(member).join(place).join(module.replace("::", "/")))
            .to_vec(),
        _ => vec![Path::new("tests/tests").join(path.replace("::", "/"))],
    };
    folders.iter().any(|module| {
        let files = [
            module.with_extension("rs"),
            module.join("main.rs"),
            module.join("mod.rs"),
            module.join("tests/mod.rs"),
        ];
        files.iter().any(|file| tests_in(file).contains(function))
    })
}

/// What cargo prints for each crate that it builds these packages of, without repetitions.
///
/// `format` and `edges` are those of `cargo tree`.
pub fn crates_of(packages: &[&str], edges: &str, format: &str) -> BTreeSet<String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let tree = Command::new(cargo)
        .args(["tree", "--locked", "--offline", "--no-dedupe", "--prefix", "none"])
        .args(["--edges", edges, "--format", format])
        .args(packages)
        .current_dir(root())
        .output()
        .expect("cargo can be started");
    assert!(tree.status.success(), "{}", String::from_utf8_lossy(&tree.stderr));
    let tree = String::from_utf8(tree.stdout).expect("names are plain");
    let lines = tree.lines().filter(|line| !line.is_empty());
    lines.map(str::to_owned).collect()
}

/// The names of the crates that the helper is built of, the workspace's own among them.
pub fn crates_of_the_helper() -> BTreeSet<String> {
    let crates = crates_of(&["--package=helper"], "normal,build", "{p}");
    let names = crates.iter().filter_map(|line| line.split(' ').next());
    names.map(str::to_owned).collect()
}
