//! What the pages say is checked where a machine can: links, configurations, commands, names of units and tests, and the
//! README's quick start and the quickstart, which are run.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use protocol::config::{CONFIG_PATH, Config};
use supervisor::settings::needs_restart;
use testbed::harness::{SUPERVISOR_UID, TEST_TIMEOUT, TestHost, binaries, tool};
use testbed::pages::Page;
use testbed::sources::{read, root};
use testbed::test_factory::TestFactory;

fn fail_with(mistakes: &[String]) {
    assert!(mistakes.is_empty(), "\n{}", mistakes.join("\n"));
}

#[test]
fn every_link_leads_to_a_file_and_a_heading_that_are_there() {
    let mut mistakes = Vec::new();
    for page in Page::all() {
        let here = page.path.parent().unwrap();
        for link in page.links().map(|link| &link.target) {
            if link.contains("://") {
                continue;
            }
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => page.path.clone(),
                file => here.join(file),
            };
            let is_there = root().join(&target).exists()
                && (heading.is_empty()
                    || !file.ends_with(".md") && !file.is_empty()
                    || Page::read(&target).anchors().contains(heading));
            if !is_there {
                mistakes.push(format!("{}: {link} leads nowhere", page.path.display()));
            }
        }
    }
    fail_with(&mistakes);
}

/// An example with what it leaves out: required keys, and the slots that it names.
fn completed(example: &str) -> String {
    let required = [
        ("[general]", "baseurl = \"https://buildomat.example.com\"\n"),
        ("[factory]", "token_file = \"/t\"\n"),
    ];
    let target = "target = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n";
    let mut text = String::new();
    if !example.contains("[slots.") {
        text += &format!("[slots.a]\n{target}");
    }
    for (header, key) in required
        .into_iter()
        .filter(|(header, _)| !example.contains(header))
    {
        text += &format!("{header}\n{key}");
    }
    let tables = example.split_inclusive('\n').collect::<Vec<_>>();
    for table in tables.chunk_by(|_, next| !next.starts_with('[')) {
        let header = table[0].trim();
        let keys = match required.iter().find(|(own, _)| *own == header) {
            Some((_, key)) => key,
            None if header.starts_with("[slots.") && header.matches('.').count() == 1 => target,
            None => "",
        };
        let name = keys.split(' ').next().unwrap();
        text += &table.concat();
        if !table.iter().any(|line| line.starts_with(name)) {
            let at = text.len() - table.concat().len() + table[0].len();
            text.insert_str(at, keys);
        }
    }
    text
}

#[test]
fn every_toml_example_is_a_good_configuration() {
    let mut count = 0;
    for page in Page::all() {
        for example in page.blocks("toml") {
            count += 1;
            if let Err(mistakes) = Config::parse(&completed(example)) {
                panic!("{}: {mistakes:?} in\n{}", page.path.display(), completed(example));
            }
        }
    }
    assert!(count > 10, "the pages have {count} examples");
    for file in ["packaging/config.toml", "packaging/minimal.toml"] {
        assert!(Config::parse(&read(file)).is_ok(), "{file}");
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

/// Every key that the parser knows, as the pages write it.
fn known_keys() -> BTreeSet<String> {
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
    assert!(known.len() > 30, "{known:?}");
    known
}

/// The keys that this configuration sets.
fn keys_set_in(text: &str, known: &BTreeSet<String>) -> BTreeSet<String> {
    fn walk(table: &toml::Table, prefix: &str, known: &BTreeSet<String>, set: &mut BTreeSet<String>) {
        for (name, value) in table {
            let name = if prefix == "slots." { "NAME" } else { name };
            let key = format!("{prefix}{name}");
            match value {
                toml::Value::Table(below) if !known.contains(&key) => {
                    walk(below, &format!("{key}."), known, set);
                }
                _ => drop(set.insert(key)),
            }
        }
    }
    let mut set = BTreeSet::new();
    walk(&text.parse().expect("an example is TOML"), "", known, &mut set);
    set
}

#[test]
fn every_key_has_a_row_and_an_example_and_no_other_has() {
    let known = known_keys();
    let page = Page::read("docs/configuration.md");
    let tables = page.tables().filter(|table| table[0][0].text == "key");
    let rows = tables.flat_map(|table| &table[1..]);
    let rows: Vec<&str> = rows.map(|row| row[0].words[0].as_str()).collect();
    let written: BTreeSet<String> = rows.iter().map(|row| row.to_string()).collect();
    assert_eq!(rows.len(), written.len(), "a key has two rows");
    assert_eq!(known, written);
    let mut examples = BTreeSet::new();
    for example in page.blocks("toml") {
        examples.append(&mut keys_set_in(example, &known));
    }
    assert_eq!(
        known,
        &(&examples & &known) | &BTreeSet::from(["slots.NAME.target".into()])
    );
    let whole = keys_set_in(&read("packaging/config.toml"), &known);
    assert_eq!(known, whole, "packaging/config.toml");
}

/// Has this file, or one in this directory, the name as a word?
fn is_named_in(path: &Path, name: &str) -> bool {
    if path.is_dir() {
        let mut entries = fs::read_dir(path).unwrap().flatten();
        return entries.any(|entry| is_named_in(&entry.path(), name));
    }
    // The end of a line, in a text within a source, is no part of the next word.
    let text = fs::read_to_string(path).unwrap_or_default().replace("\\n", " ");
    text.split(|c: char| !c.is_alphanumeric() && c != '_')
        .any(|word| word == name)
}

#[test]
fn every_key_is_in_each_file_of_the_checklist() {
    let page = Page::read("CONTRIBUTING.md");
    let checklist = page.tables().find(|table| table[0][0].text == "file");
    let checklist = checklist.expect("CONTRIBUTING.md has the checklist");
    let checked: Vec<_> = checklist.iter().filter(|row| row[2].text == "✓").collect();
    assert!(checked.len() > 4, "{checked:?}");
    let mut mistakes = Vec::new();
    for key in known_keys() {
        let name = key.rsplit('.').next().unwrap();
        for row in &checked {
            if !row[0]
                .words
                .iter()
                .any(|file| is_named_in(&root().join(file), name))
            {
                mistakes.push(format!("{key} is not in {}", row[0].text));
            }
        }
    }
    for path in checklist[1..].iter().flat_map(|row| &row[0].words) {
        if path.contains(['/', '.']) && !root().join(path).exists() {
            mistakes.push(format!("CONTRIBUTING.md: there is no {path}"));
        }
    }
    fail_with(&mistakes);
}

/// Keys marked † are those that a running supervisor refuses to change. Each is given two values here.
#[test]
fn the_keys_that_need_a_restart_of_the_supervisor_are_marked() {
    let config = |n: u8| {
        let text = format!(
            "[general]\nbaseurl = \"https://h{n}\"\nproxy = \"http://h:{n}\"\n[factory]\ntoken_file = \"/t\"\nuser = \"u{n}\"\n\
             uid_range = \"{n}200000-{n}200100\"\nstatus_address = \"127.0.0.1:{n}\"\nstatus_names = [\"h{n}\"]\n\
             [slots.a]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n"
        );
        Config::parse(&text).unwrap_or_else(|mistakes| panic!("{mistakes:?}"))
    };
    let refused = needs_restart(&config(1), &config(2)).expect("keys differ that need a restart");
    let page = Page::read("docs/configuration.md");
    let tables = page.tables().filter(|table| table[0][0].text == "key");
    let marked = tables
        .flat_map(|table| &table[1..])
        .filter(|row| row[0].text.contains('†'));
    let marked: BTreeSet<&str> = marked.map(|row| row[0].words[0].as_str()).collect();
    assert_eq!(marked, refused.split(", ").collect());
}

/// What is between backticks, and what else is a link's text.
fn words(page: &Page) -> impl Iterator<Item = String> {
    let texts = page.links().map(|link| link.text.as_str());
    page.words().chain(texts).map(str::to_owned)
}

#[test]
fn every_command_in_the_pages_is_one_that_the_program_understands() {
    let program = binaries().join("user-factory");
    let mut mistakes = Vec::new();
    let mut count = 0;
    for page in Page::all() {
        let typed = words(&page).chain(page.commands());
        for line in typed.filter(|line| line.starts_with("user-factory ")) {
            // What stands for something else, and what is said with a pipe or two commands.
            let line = line
                .replace("WORKER", "01JAB3CDEFGHJKMNPQRSTVWXYZ")
                .replace("--slot SLOT", "--slot a");
            let mut words: Vec<&str> = line.split_whitespace().skip(1).collect();
            if matches!(words[..], ["COMMAND", ..] | ["serve" | "check" | "run", ..] if words.contains(&"…"))
            {
                continue;
            }
            // The help is asked for after all else has been understood, and nothing is done.
            let end = words.iter().position(|word| *word == "--").unwrap_or(words.len());
            words.insert(end, "--help");
            words.truncate(end + 1);
            let words: Vec<&str> = words.into_iter().filter(|word| *word != "COMMAND").collect();
            let output = Command::new(&program).args(&words).output().unwrap();
            count += 1;
            if !output.status.success() {
                let printed = String::from_utf8_lossy(&output.stderr);
                let first = printed.lines().next().unwrap_or_default();
                mistakes.push(format!("{}: {line}: {first}", page.path.display()));
            }
        }
    }
    assert!(count > 20, "the pages have {count} commands");
    fail_with(&mistakes);
}

#[test]
fn every_unit_test_program_and_scenario_that_the_pages_name_is_there() {
    let mut mistakes = Vec::new();
    let exists = |places: &[String]| places.iter().any(|place| root().join(place).exists());
    for page in Page::all() {
        let typed = words(&page).chain(page.commands());
        for line in typed {
            let words: Vec<&str> = line.split_whitespace().collect();
            for word in &words {
                let unit = word.trim_matches(|c| matches!(c, '\'' | '"'));
                let is_unit = [".service", ".socket", ".timer"]
                    .iter()
                    .any(|kind| unit.ends_with(kind));
                if unit.starts_with("buildomat-user-factory")
                    && is_unit
                    && !unit.contains(['*', '/'])
                    && !exists(&[format!("packaging/systemd/{unit}")])
                {
                    mistakes.push(format!("{}: there is no unit {unit}", page.path.display()));
                }
            }
            for pair in words.windows(2) {
                let name = pair[1];
                // A program of cargo's is a file, or a directory with a `main.rs`.
                let program = |dir: &str| [format!("{dir}/{name}.rs"), format!("{dir}/{name}/main.rs")];
                let places: Vec<String> = match pair[0] {
                    "--test" => ["tests/tests", "supervisor/tests", "helper/tests"]
                        .iter()
                        .flat_map(|dir| program(dir))
                        .collect(),
                    "--bench" => program("tests/benches").into(),
                    "--bin" => program("tests/src/bin").into(),
                    "tests/machine/run" if name != "all" => ["hosts", "scenarios"]
                        .map(|dir| format!("tests/machine/{dir}/{name}"))
                        .into(),
                    _ => continue,
                };
                let is_name = name
                    .chars()
                    .all(|c| c.is_ascii_lowercase() || matches!(c, '_' | '-'));
                if is_name && !exists(&places) {
                    mistakes.push(format!("{}: {line}: there is no {name}", page.path.display()));
                }
            }
        }
    }
    fail_with(&mistakes);
}

#[test]
fn the_packages_that_a_build_needs_are_those_that_the_quick_start_installs() {
    let makefile = fs::read_to_string(root().join("Makefile")).expect("a Makefile");
    let packages = makefile.lines().find_map(|line| line.strip_prefix("packages = "));
    let install = format!("apt install git {}", packages.expect("the Makefile has a list"));
    assert_eq!(Page::read("docs/quickstart.md").commands()[0], install);
}

#[test]
fn the_quick_start_is_run_and_each_command_does_what_the_readme_says() {
    let commands = Page::read("README.md").commands();
    let begin = commands
        .iter()
        .position(|line| line == "make deb")
        .expect("the quick start begins with the package");
    let [_, install, copy, start, id, last] = &commands[begin..begin + 6] else {
        panic!("the quick start has six lines")
    };
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(
        *install,
        format!("apt install ./target/debian/buildomat-user-factory_{version}-1_amd64.deb")
    );
    // Its file, with what keeps this test apart from the host's own factory.
    let config = format!("install -m 644 packaging/minimal.toml /{CONFIG_PATH}");
    assert_eq!(*copy, config);
    let host = TestHost::new();
    host.configure("http://127.0.0.1:9", SUPERVISOR_UID, "");
    let path = host.root.join(CONFIG_PATH);
    let own = fs::read_to_string(&path).unwrap();
    let own: String = own
        .lines()
        .filter(|line| line.starts_with("user") || line.starts_with("uid_range"))
        .map(|line| format!("{line}\n"))
        .collect();
    let minimal = read("packaging/minimal.toml");
    fs::write(
        &path,
        minimal.replace("[factory]\n", &format!("[factory]\n{own}")),
    )
    .unwrap();
    assert_eq!(start, "systemctl start buildomat-user-factory-helper.service");
    let _helper = host.start_helper();
    let run = |line: &str| {
        let place = format!("run --root {} ", host.root.display());
        let line = line.replacen("run ", &place, 1);
        let path = format!("{}:{}", binaries().display(), std::env::var("PATH").unwrap());
        let output = Command::new("sh")
            .args(["-c", &line])
            .env("PATH", path)
            .output()
            .unwrap();
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        (
            output.status.success(),
            printed + &String::from_utf8_lossy(&output.stderr),
        )
    };
    let (good, printed) = run(id);
    assert!(good && printed.contains("(bmat-"), "{id}: {printed}");
    tool("ps");
    let (good, printed) = run(last);
    let processes = printed.lines().filter(|line| line.contains(':')).count();
    assert!(
        !good && printed.contains("ps ax") && processes < 8 && printed.contains("/etc/passwd"),
        "{last}: {printed}"
    );
}

/// The rest of quickstart.md, from the configuration to the job. What only a real server and a real host have stands for
/// itself: the server's address, the target, the token, and limits that this machine may not enforce.
#[tokio::test(flavor = "multi_thread")]
async fn the_quickstart_begins_as_the_readme_does_and_the_rest_of_it_ends_in_a_job() {
    let page = Page::read("docs/quickstart.md");
    let begin = page
        .section("1. Install the package")
        .commands()
        .into_iter()
        .skip_while(|line| line != "make deb");
    let begin: Vec<String> = begin
        .chain(
            page.section("2. Run a command in a slot, without a server")
                .commands(),
        )
        .collect();
    let readme = Page::read("README.md").section("Quick start").commands();
    assert_eq!(begin, readme[..5]);

    let configure = page.section("4. Configure");
    let example = configure.blocks("toml").next().expect("there is a configuration");
    let (_, slot) = example.split_once("[slots.first]").expect("it has a slot");
    let slot = format!("[slots.first]{slot}");
    let target = slot
        .split('"')
        .nth(1)
        .expect("the first text is the target")
        .to_owned();
    let slot = slot
        .replace(&target, "TARGET")
        .replace("limits = { ", "limits = { best_effort = true, ");
    let factory = TestFactory::new(&slot).await;
    let config = factory.host.root.join(CONFIG_PATH).display().to_string();
    let root = format!(" --root {}", factory.host.root.display());
    let mut count = 0;
    for line in [
        configure.commands(),
        page.section("5. Start").commands(),
        page.section("6. Run a job").commands(),
    ]
    .concat()
    {
        if line == "systemctl start buildomat-user-factory.service" {
            // The factory runs already; the scenario `deployment` starts it so.
            continue;
        }
        if let Some(command) = line.strip_prefix("install ") {
            // The token is pasted: here, the one that the factory has, beside it. Root's own file would be closed to
            // the supervisor, which has no credential of systemd's here.
            let pasted = fs::read_to_string(factory.host.root.join("token")).unwrap();
            let token = factory.host.root.join("pasted");
            let command = command.replace("/etc/buildomat-user-factory/token", &token.display().to_string());
            let mut typed = Command::new("install");
            let mut typed = typed
                .args(command.split(' '))
                .stdin(Stdio::piped())
                .spawn()
                .unwrap();
            let mut input = typed.stdin.take().expect("it was piped");
            input.write_all(pasted.as_bytes()).unwrap();
            drop(input);
            assert!(typed.wait().unwrap().success(), "{line}");
            assert_eq!(fs::read_to_string(&token).unwrap(), pasted);
            assert_eq!(fs::metadata(&token).unwrap().permissions().mode() & 0o777, 0o600);
            count += 1;
        } else {
            let command = line.strip_prefix("user-factory ");
            let command = command.unwrap_or_else(|| panic!("nothing here types {line}"));
            let command = command.replace(&format!("/{CONFIG_PATH}"), &config) + &root;
            let end = Instant::now() + TEST_TIMEOUT;
            loop {
                let mut typed = Command::new(binaries().join("user-factory"));
                typed.args(command.split(' '));
                let output = tokio::task::block_in_place(|| typed.output()).unwrap();
                // After a start `status` ends with 3 until the supervisor listens, and with 4 until server and helper have
                // answered.
                if output.status.success() {
                    break;
                }
                let printed = String::from_utf8_lossy(&output.stdout);
                assert!(
                    matches!(output.status.code(), Some(3 | 4)) && Instant::now() < end,
                    "{line}: {printed}"
                );
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            count += 1;
        }
    }
    assert_eq!(count, 3, "the token, check and status");

    let section = page.section("6. Run a job");
    let typed = section.blocks("text").next().expect("there is a job");
    let script = typed.split('\'').nth(1).expect("it has a script");
    let job = factory.submit(script);
    factory.wait_completed(job).await;
    factory.finish().await;
}
