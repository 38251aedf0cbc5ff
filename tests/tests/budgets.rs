//! Root's half stays small enough to be read: what it is made of is counted, and no more than budgets.toml says.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use proc_macro2::{Delimiter, TokenStream, TokenTree};
use serde::Deserialize;
use syn::spanned::Spanned;
use syn::{Attribute, Item};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Budget {
    limit: usize,
    reason: String,
}

fn allow(what: &str, count: usize) {
    let mut budgets: BTreeMap<String, Budget> = toml::from_str(&read(&root().join("budgets.toml"))).unwrap();
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

/// The code of one file, without its tests.
#[derive(Default)]
struct Module {
    /// The lines that hold at least one token.
    lines: BTreeSet<usize>,
    unsafes: usize,
}

/// What can be reached from a crate's root file.
#[derive(Default)]
struct Sources {
    modules: BTreeMap<PathBuf, Module>,
    tests: BTreeSet<PathBuf>,
}

/// Is it compiled for tests alone? `not`, `any` and the like may be more than that, so they are not.
fn is_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && attribute
                .parse_args::<syn::Ident>()
                .is_ok_and(|word| word == "test")
    })
}

fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(it) => &it.attrs,
        Item::Enum(it) => &it.attrs,
        Item::Fn(it) => &it.attrs,
        Item::Impl(it) => &it.attrs,
        Item::Macro(it) => &it.attrs,
        Item::Mod(it) => &it.attrs,
        Item::Static(it) => &it.attrs,
        Item::Struct(it) => &it.attrs,
        Item::Trait(it) => &it.attrs,
        Item::Type(it) => &it.attrs,
        Item::Use(it) => &it.attrs,
        // What else there is counts, whatever is written before it.
        _ => &[],
    }
}

/// Where the module that `it` declares is: beside `file` where that is a folder's own, else in a folder of its name.
fn place_of(it: &syn::ItemMod, file: &Path) -> PathBuf {
    let dir = file.parent().unwrap();
    for attribute in &it.attrs {
        if attribute.path().is_ident("path") {
            let syn::Meta::NameValue(path) = &attribute.meta else {
                panic!("a path is a text")
            };
            let syn::Expr::Lit(syn::ExprLit {
                lit: syn::Lit::Str(path),
                ..
            }) = &path.value
            else {
                panic!("a path is a text")
            };
            return dir.join(path.value());
        }
    }
    let stem = file.file_stem().unwrap().to_str().unwrap();
    let dir = if ["lib", "main", "mod"].contains(&stem) {
        dir.to_owned()
    } else {
        dir.join(stem)
    };
    let name = it.ident.to_string();
    let alone = dir.join(&name).with_extension("rs");
    if alone.exists() {
        alone
    } else {
        dir.join(name).join("mod.rs")
    }
}

impl Sources {
    fn of(crate_name: &str) -> Sources {
        let src = root().join(crate_name).join("src");
        let mut sources = Sources::default();
        for name in ["lib.rs", "main.rs", "manual/main.rs"] {
            if src.join(name).exists() {
                sources.add(&src.join(name), false);
            }
        }
        // A file that no module declares is compiled by some way that is not followed here.
        let mut folders = vec![src];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    let known = sources.modules.contains_key(&path) || sources.tests.contains(&path);
                    assert!(known, "{} is no module of {crate_name}", path.display());
                }
            }
        }
        sources
    }

    fn add(&mut self, path: &Path, is_for_tests: bool) {
        let text = read(path);
        let file = syn::parse_file(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let mut left_out = Vec::new();
        for item in &file.items {
            let is_for_tests = is_for_tests || is_test(attributes(item));
            if is_for_tests {
                let span = item.span();
                left_out.push(span.start().line..=span.end().line);
            }
            if let Item::Mod(it) = item
                && it.content.is_none()
            {
                self.add(&place_of(it, path), is_for_tests);
            }
        }
        if is_for_tests {
            self.tests.insert(path.into());
            return;
        }
        let mut module = Module::default();
        module.count(text.parse().unwrap());
        // `unsafe` counts in them too.
        module
            .lines
            .retain(|line| !left_out.iter().any(|lines| lines.contains(line)));
        self.modules.insert(path.into(), module);
    }
}

impl Module {
    fn count(&mut self, tokens: TokenStream) {
        let mut tokens = tokens.into_iter().peekable();
        while let Some(token) = tokens.next() {
            // A comment that documents something is `#[doc = "…"]` to the compiler.
            if let TokenTree::Punct(hash) = &token
                && hash.as_char() == '#'
            {
                let mut rest = tokens.clone();
                let next = match rest.next() {
                    Some(TokenTree::Punct(mark)) if mark.as_char() == '!' => rest.next(),
                    next => next,
                };
                if next.is_some_and(|next| is_documentation(&next)) {
                    tokens = rest;
                    continue;
                }
            }
            match token {
                TokenTree::Group(group) => {
                    if group.delimiter() != Delimiter::None {
                        self.lines.insert(group.span_open().start().line);
                        self.lines.insert(group.span_close().end().line);
                    }
                    self.count(group.stream());
                }
                token => {
                    let span = token.span();
                    self.lines.extend(span.start().line..=span.end().line);
                    if let TokenTree::Ident(word) = &token {
                        self.unsafes += usize::from(word == "unsafe");
                        // It would bring in what is not counted.
                        assert!(
                            !["include", "include_str"].contains(&word.to_string().as_str()),
                            "{word}"
                        );
                    }
                }
            }
        }
    }
}

fn is_documentation(token: &TokenTree) -> bool {
    let TokenTree::Group(group) = token else {
        return false;
    };
    let mut inside = group.stream().into_iter();
    matches!(inside.next(), Some(TokenTree::Ident(word)) if word == "doc")
        && matches!(inside.next(), Some(TokenTree::Punct(mark)) if mark.as_char() == '=')
}

fn both() -> Vec<(String, Module)> {
    let of = |name| Sources::of(name).modules.into_iter();
    of("protocol")
        .chain(of("helper"))
        .map(|(path, module)| (path.strip_prefix(root()).unwrap().display().to_string(), module))
        .collect()
}

#[test]
fn the_code_of_roots_half_can_be_read_in_an_afternoon() {
    let modules = both();
    for (path, module) in &modules {
        println!("{:>5} {path}", module.lines.len());
    }
    allow(
        "lines",
        modules.iter().map(|(_, module)| module.lines.len()).sum(),
    );
}

#[test]
fn what_is_unsafe_is_in_one_place_of_each_crate_and_little() {
    let mut all = 0;
    for (path, module) in both() {
        assert!(
            module.unsafes == 0 || ["helper/src/sys.rs", "protocol/src/sys.rs"].contains(&path.as_str()),
            "{path} has {} times unsafe: that is for sys.rs",
            module.unsafes
        );
        all += module.unsafes;
    }
    assert!(all > 0, "nothing was counted");
    allow("unsafe", all);
}

#[test]
fn the_supervisor_can_ask_for_few_things() {
    let file = syn::parse_file(&read(&root().join("protocol/src/message.rs"))).unwrap();
    let requests = file.items.iter().find_map(|item| match item {
        Item::Enum(it) if it.ident == "Request" => Some(it.variants.len()),
        _ => None,
    });
    allow("requests", requests.expect("the requests are there"));
}

/// What cargo takes for the helper.
fn crates_of_the_helper() -> BTreeSet<String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let tree = Command::new(cargo)
        .args([
            "tree",
            "--locked",
            "--package",
            "helper",
            "--edges",
            "normal,build",
            "--prefix",
            "none",
            "--no-dedupe",
        ])
        .current_dir(root())
        .output()
        .expect("cargo can be started");
    assert!(tree.status.success(), "{}", String::from_utf8_lossy(&tree.stderr));
    let text = String::from_utf8(tree.stdout).unwrap();
    text.lines()
        .filter_map(|line| Some(line.split(' ').next()?.to_owned()))
        .collect()
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
    let list: toml::Table = toml::from_str(&read(&root().join("helper/deny.toml"))).unwrap();
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

/// A sentence that only the program of the commands by hand has, and one that only the helper has.
#[test]
fn the_helpers_program_has_nothing_of_the_commands_by_hand() {
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
    let told = Command::new("readelf")
        .arg("--dynamic")
        .arg(&program)
        .output()
        .expect("readelf can be started");
    assert!(told.status.success(), "{}", String::from_utf8_lossy(&told.stderr));
    let told = String::from_utf8_lossy(&told.stdout);
    let mut libraries = BTreeSet::new();
    for line in told.lines().filter(|line| line.contains("(NEEDED)")) {
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
fn lines_are_counted_by_their_tokens() {
    let text = r##"//! Documentation.

/// More of it.
#[derive(Debug)]
struct A; // a comment

/* another
 */
const TEXT: &str = "two
lines";

#[doc = "A way to write a comment."]
#[cfg(test)]
mod tests {
    fn not_counted() {}
}

fn f() {
    unsafe { g() }
}
"##;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lib.rs");
    fs::write(&path, text).unwrap();
    let mut sources = Sources::default();
    sources.add(&path, false);
    let module = &sources.modules[&path];
    assert_eq!(
        Vec::from_iter(module.lines.iter().copied()),
        [4, 5, 9, 10, 18, 19, 20]
    );
    assert_eq!(module.unsafes, 1);
}
