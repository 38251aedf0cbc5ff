//! What is wrong with a configuration beyond its form, each mistake with its line: a server that the token must not be
//! sent to, and what this host lacks. `serve`, `reload` and `check` ask here; `check` and `reload` refuse the same.

use std::fmt;
use std::fs::{self, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use protocol::config::{BaseUrl, CONFIG_PATH, Config, HostPath, Mistake, accounts};

use crate::settings;

/// The files of the host that name users and groups. The helper reads the same ones, and asks no name service.
#[derive(Clone, Debug, Default)]
pub struct Accounts {
    /// `/etc/passwd`, see passwd(5).
    pub passwd: String,
    /// `/etc/group`, see group(5).
    pub group: String,
    /// `/etc/subuid`, see subuid(5).
    pub subuid: String,
    /// `/etc/subgid`, see subgid(5).
    pub subgid: String,
}

impl Accounts {
    /// Those of this host; a file that cannot be read names no account.
    pub fn read() -> Accounts {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        Accounts {
            passwd: read("/etc/passwd"),
            group: read("/etc/group"),
            subuid: read("/etc/subuid"),
            subgid: read("/etc/subgid"),
        }
    }
}

/// Parse a configuration, and refuse a server that the token would be sent to in the clear.
///
/// # Errors
/// The mistakes, in the order of their lines.
pub fn parse(text: &str) -> Result<Config, Vec<Mistake>> {
    let config = Config::parse(text)?;
    let baseurl = &config.general.baseurl;
    let is_http = baseurl.as_str().starts_with("http://");
    if let Some(proxy) = config
        .general
        .proxy
        .as_ref()
        .filter(|_| is_http && !config.general.allow_http)
    {
        return Err(vec![Mistake {
            line: line_of(text, &["general", "proxy"]),
            message: format!(
                "{proxy} would see the factory's token and the agent's program, as {baseurl} is not encrypted: use https:// in general.baseurl, or set general.allow_http = true if the proxy and every host on the way is trusted"
            ),
        }]);
    }
    if config.general.allow_http || !is_http_to_another_host(baseurl) {
        return Ok(config);
    }
    Err(vec![Mistake {
        line: line_of(text, &["general", "baseurl"]),
        message: format!(
            "{baseurl} would carry the factory's token and the agent's program unencrypted over a network: use https://, or set general.allow_http = true if every host on the way is trusted"
        ),
    }])
}

/// The configuration at `path`, checked against this host. `root` is where the factory's files are looked for.
///
/// # Errors
/// The mistakes, in the order of their lines.
pub fn load(path: &Path, root: &Path) -> Result<Config, Vec<Mistake>> {
    let text = settings::read(path)?;
    let config = parse(&text)?;
    let mut mistakes = mistakes_on_host(&text, &config, &Accounts::read());
    mistakes.extend(mistake_of_mode(path, root));
    mistakes.sort_by_key(|mistake| mistake.line);
    if mistakes.is_empty() {
        Ok(config)
    } else {
        Err(mistakes)
    }
}

/// The configuration file, while a configuration is in use.
pub trait ConfigFile: fmt::Debug + Send {
    /// What the file says else than `in_use`, in a sentence; none where it says the same. The helper reads slots, the server
    /// and the agent's variables in the file at each request, and this configuration is what jobs are leased by.
    fn difference(&mut self, in_use: &Config) -> Option<String>;
}

/// A file of this host, read only where stat(2) shows a change.
#[derive(Debug)]
pub struct FileOnDisk {
    path: PathBuf,
    /// Device, inode, length, and when the file and its inode were changed.
    seen: Option<(u64, u64, u64, i64, i64, i64, i64)>,
    /// What it says, or what is wrong with it.
    content: Result<Config, String>,
}

impl FileOnDisk {
    /// It is read when it is first asked about.
    pub fn new(path: PathBuf) -> FileOnDisk {
        FileOnDisk {
            path,
            seen: None,
            content: Err("it has not been read".into()),
        }
    }
}

impl ConfigFile for FileOnDisk {
    fn difference(&mut self, in_use: &Config) -> Option<String> {
        let seen = fs::metadata(&self.path).ok().map(|meta| {
            let (modified, changed) = (meta.mtime(), meta.ctime());
            let (inode, length) = (meta.ino(), meta.len());
            (
                meta.dev(),
                inode,
                length,
                modified,
                meta.mtime_nsec(),
                changed,
                meta.ctime_nsec(),
            )
        });
        if seen.is_none() || self.seen != seen {
            self.seen = seen;
            let content = settings::read(&self.path).and_then(|text| parse(&text));
            self.content = content.map_err(|mistakes| {
                let mistakes = settings::print(&self.path, &mistakes);
                mistakes.trim_end().replace('\n', "; ")
            });
        }
        match &self.content {
            Ok(content) => {
                let (a, b) = (content, in_use);
                let changed: Vec<&str> = [
                    ("the slots", a.slots != b.slots),
                    ("general.baseurl", a.general.baseurl != b.general.baseurl),
                    ("general.proxy", a.general.proxy != b.general.proxy),
                    ("factory.agent_env", a.factory.agent_env != b.factory.agent_env),
                ]
                .into_iter()
                .filter_map(|(what, has_changed)| has_changed.then_some(what))
                .collect();
                (!changed.is_empty()).then(|| {
                    format!(
                        "{} of the configuration file have changed since it was loaded: `user-factory reload` loads it",
                        changed.join(", ")
                    )
                })
            }
            Err(why) => Some(format!("the configuration file cannot be loaded: {why}")),
        }
    }
}

/// Does `http://` lead to another host than this one? `localhost` and addresses of the loopback network do not.
fn is_http_to_another_host(baseurl: &BaseUrl) -> bool {
    let Some(rest) = baseurl.as_str().strip_prefix("http://") else {
        return false;
    };
    let authority = rest.split('/').next().unwrap_or_default();
    let host = match authority.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => authority.split(':').next().unwrap_or_default(),
    };
    let is_loopback = |host: &str| match host.parse::<std::net::IpAddr>() {
        Ok(address) => address.is_loopback(),
        Err(_) => host.eq_ignore_ascii_case("localhost"),
    };
    !is_loopback(host)
}

/// The line of this key, beginning with 1; that of the nearest table where the key is not written.
pub fn line_of(text: &str, keys: &[&str]) -> usize {
    let Ok(table) = toml::de::DeTable::parse(text) else {
        return 1;
    };
    let mut table = table.get_ref();
    let mut offset = 0;
    for key in keys {
        let entry = table.iter().find(|(name, _)| name.get_ref() == key);
        let Some((name, value)) = entry else { break };
        offset = name.span().start;
        match value.get_ref() {
            toml::de::DeValue::Table(inner) => table = inner,
            _ => break,
        }
    }
    1 + text.bytes().take(offset).filter(|b| *b == b'\n').count()
}

/// Where a job has other files than the host, or none.
pub(crate) const NOT_IN_A_JOB: [&str; 8] = [
    "/home",
    "/root",
    "/run",
    "/var/run",
    "/tmp",
    "/var/tmp",
    "/dev/shm",
    "/etc/buildomat-user-factory",
];

/// What this configuration names and this host does not have, as far as this user can see.
pub fn mistakes_on_host(text: &str, config: &Config, accounts: &Accounts) -> Vec<Mistake> {
    let mut mistakes = Vec::new();
    let mut note = |keys: &[&str], message: String| {
        let line = line_of(text, keys);
        mistakes.push(Mistake { line, message });
    };
    let factory = &config.factory;
    match accounts::supervisor(&accounts.passwd, &factory.user, factory.uid_range) {
        Ok((0, _)) => note(
            &["factory", "user"],
            "factory.user is root, and the supervisor must not be: name a user that it has for itself".into(),
        ),
        Ok(_) => {}
        Err(message) => note(&["factory", "user"], message),
    }
    let files = [
        &accounts.subuid,
        &accounts.subgid,
        &accounts.passwd,
        &accounts.group,
    ];
    for (name, file) in accounts::FILES_OF_IDS.into_iter().zip(files) {
        if let Err(message) = accounts::check_range(name, file, config.factory.uid_range) {
            note(&["factory", "uid_range"], message);
        }
    }
    for path in &config.factory.hide {
        // A directory that this user may not enter is looked at by the helper.
        if let Err(error) = path.as_path().canonicalize()
            && !is_permission_denied(&error)
        {
            note(
                &["factory", "hide"],
                format!("{path}, named in hide, cannot be hidden: {error}; make it, or remove it from hide"),
            );
        }
    }
    if let Some(agent) = &config.factory.agent
        && let Some(why) = unfit_agent(agent.as_path())
    {
        note(
            &["factory", "agent"],
            format!(
                "{agent} {why}: name an agent's program for this machine, or remove the key for the server's"
            ),
        );
    }
    for (name, value) in &config.factory.agent_env {
        let path = Path::new(value.as_str());
        let hidden = NOT_IN_A_JOB.map(Path::new);
        let mut hidden = hidden
            .into_iter()
            .chain(config.factory.hide.iter().map(HostPath::as_path));
        let why = if name.as_str() != "SSL_CERT_FILE" {
            None
        } else if let Some(top) = hidden.find(|top| path.starts_with(top)) {
            Some(format!(
                "is below {}, which no job sees: choose another path",
                top.display()
            ))
        } else {
            let why = missing(path, Metadata::is_file, "is not a file");
            why.map(|why| format!("{why}: write the certificates there, or remove it from agent_env"))
        };
        if let Some(why) = why {
            note(
                &["factory", "agent_env", name.as_str()],
                format!("{name}: {value} {why}"),
            );
        }
    }
    for (name, slot) in &config.slots {
        let mut note = |key: &[&str], message: String| {
            let keys = [&["slots", name.as_str()], key].concat();
            note(&keys, format!("slot {name}: {message}"));
        };
        for group in &slot.add_to_groups {
            if let Err(message) = accounts::gid(&accounts.group, group) {
                note(&["add_to_groups"], message);
            }
        }
        for (place, source) in &slot.read_only {
            if let Some(why) = missing(source.as_path(), Metadata::is_dir, "is not a directory") {
                note(
                    &["read_only", &place.to_string()],
                    format!("{source} {why}: name a directory, or remove it from read_only"),
                );
            }
        }
        for device in slot.devices.iter().filter(|device| device.is_plain()) {
            let is_device = |meta: &Metadata| {
                meta.is_dir() || meta.file_type().is_char_device() || meta.file_type().is_block_device()
            };
            let path = Path::new("/dev").join(device.below_dev());
            if let Some(why) = missing(&path, is_device, "is not a device") {
                note(
                    &["devices"],
                    format!("{device} {why}: plug it in, name a device node, or remove it from devices"),
                );
            }
        }
    }
    mistakes
}

/// Why what is at `path` cannot be used, or nothing where it can, or where this user may not read.
fn missing(path: &Path, is_right: impl FnOnce(&Metadata) -> bool, wrong: &str) -> Option<String> {
    match fs::metadata(path) {
        Ok(meta) if is_right(&meta) => None,
        Ok(_) => Some(wrong.to_owned()),
        Err(error) if is_permission_denied(&error) => None,
        Err(error) => Some(format!("cannot be used ({error})")),
    }
}

/// Why this file is no program for this machine, as far as this user can see.
fn unfit_agent(path: &Path) -> Option<String> {
    if let Some(why) = missing(path, Metadata::is_file, "is not a file") {
        return Some(why);
    }
    if let Some(why) = missing(path, |meta| meta.mode() & 0o111 != 0, "is not executable") {
        return Some(why);
    }
    match (elf_machine(path), elf_machine(Path::new("/proc/self/exe"))) {
        (Err(error), _) if is_permission_denied(&error) => None,
        (Err(error), _) => Some(format!("cannot be read ({error})")),
        (Ok(None), _) => Some("is not an ELF program".into()),
        (Ok(Some(its)), Ok(Some(ours))) if its != ours => Some("is a program for another machine".into()),
        (Ok(Some(_)), _) => None,
    }
}

/// Class, byte order and machine of a program (`e_ident` and `e_machine` of elf(5)); none where it is not ELF.
fn elf_machine(path: &Path) -> io::Result<Option<[u8; 4]>> {
    let mut head = Vec::new();
    fs::File::open(path)?.take(20).read_to_end(&mut head)?;
    let is_elf = head.len() == 20 && head.starts_with(b"\x7fELF");
    Ok(is_elf.then(|| [head[4], head[5], head[18], head[19]]))
}

/// What this user may not read may well be there.
fn is_permission_denied(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::PermissionDenied
}

/// The helper reads the installed configuration only where it, and every directory above it, is root's and nobody
/// else may write it. A draft elsewhere may be anybody's, but not everybody's.
fn mistake_of_mode(path: &Path, root: &Path) -> Option<Mistake> {
    let path = path.canonicalize().ok()?;
    let is_installed = root
        .join(CONFIG_PATH)
        .canonicalize()
        .is_ok_and(|installed| installed == path);
    let is_safe = |path: &Path, is_file: bool| {
        let Ok(meta) = fs::symlink_metadata(path) else {
            return true;
        };
        // In a sticky directory, as /tmp is, only root can replace what is root's (inode(7)).
        let others = if is_file || meta.mode() & 0o1000 == 0 {
            0o022
        } else {
            0
        };
        meta.uid() == 0 && meta.mode() & others == 0
    };
    let unsafe_path = if is_installed {
        path.ancestors().find(|part| !is_safe(part, *part == path))?
    } else if fs::metadata(&path).is_ok_and(|meta| meta.mode() & 0o002 != 0) {
        &path
    } else {
        return None;
    };
    let name = unsafe_path.display();
    Some(Mistake {
        line: 1,
        message: format!(
            "{name} can be written by others than root, who could take over the host through it: chown root: {name} and chmod go-w {name}"
        ),
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn text(general: &str, factory: &str, slot: &str) -> String {
        format!(
            "[general]\n{general}\n[factory]\ntoken_file = \"/t\"\n{factory}\n[slots.a]\n\
             target = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n{slot}\n"
        )
    }

    fn accounts() -> Accounts {
        Accounts {
            passwd: "root:x:0:0::/:/x\nbuildomat-factory:x:7:7::/:/x\n".into(),
            group: "root:x:0:\nhere:x:5:\n".into(),
            subuid: "lxd:100000:65536\nroot:3000000:65536\n".into(),
            subgid: String::new(),
        }
    }

    fn mistakes(text: &str) -> Vec<(usize, String)> {
        let config = parse(text).unwrap();
        let mistakes = mistakes_on_host(text, &config, &accounts());
        mistakes.into_iter().map(|m| (m.line, m.message)).collect()
    }

    #[test]
    fn an_agent_of_the_host_is_a_program_for_this_machine() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("agent");
        let agent = |place: &Path| {
            let key = format!("agent = {place:?}");
            mistakes(&text("baseurl = \"https://b\"", &key, ""))
        };
        let expect = |part: &str| {
            let found = agent(&place);
            assert!(
                found.len() == 1 && found[0].0 == 5 && found[0].1.contains(part),
                "{part}: {found:?}"
            );
        };
        expect("No such file");
        let own = fs::read("/proc/self/exe").unwrap();
        let write = |bytes: &[u8], mode| {
            fs::write(&place, bytes).unwrap();
            fs::set_permissions(&place, fs::Permissions::from_mode(mode)).unwrap();
        };
        write(&own[..64], 0o644);
        expect("is not executable");
        write(b"#!/bin/bash\necho this is no program\n", 0o755);
        expect("is not an ELF program");
        write(b"", 0o755);
        expect("is not an ELF program");
        let mut other = own[..64].to_vec();
        other[18] ^= 0x40;
        write(&other, 0o755);
        expect("is a program for another machine");
        write(&own[..64], 0o755);
        assert_eq!(agent(&place), []);
        assert!(agent(dir.path())[0].1.contains("is not a file"));
    }

    #[test]
    fn a_token_is_sent_unencrypted_to_this_host_alone_unless_a_key_allows_more() {
        for (url, is_fine) in [
            ("https://b.example", true),
            ("http://localhost:9979", true),
            ("http://127.8.9.1", true),
            ("http://[::1]:80/b", true),
            ("http://b.example", false),
            ("http://localhost.example", false),
            ("http://10.0.0.1:80", false),
            ("http://[fd00::1]", false),
        ] {
            let config = text(&format!("\nbaseurl = \"{url}\""), "", "");
            match parse(&config) {
                Ok(_) => assert!(is_fine, "{url}"),
                Err(mistakes) => {
                    assert!(!is_fine, "{url}: {mistakes:?}");
                    assert_eq!(mistakes[0].line, 3);
                    assert!(mistakes[0].message.contains("allow_http"), "{mistakes:?}");
                }
            }
            let allowed = text(&format!("baseurl = \"{url}\"\nallow_http = true"), "", "");
            assert!(parse(&allowed).is_ok(), "{url}");
        }
    }

    #[test]
    fn what_the_host_does_not_have_is_told_with_its_line() {
        let url = "baseurl = \"http://localhost\"";
        assert_eq!(
            mistakes(&text(
                url,
                "",
                "add_to_groups = [\"here\"]\ndevices = [\"/dev/null\"]"
            )),
            []
        );
        let found = mistakes(&text(
            url,
            "user = \"away\"\nuid_range = \"3000001-3000009\"\nhide = [\"/usr\", \"/no/such/place\"]",
            "add_to_groups = [\"here\",\n  \"away\", \"root\"]\nread_only = { \"/srv/x\" = \"/no/such/directory\", \"/srv/y\" = \"/etc/passwd\" }\n\
             devices = [\"/dev/no-such-device\", \"/dev/null\"]",
        ));
        let expected = [
            (5, "the user away is not in /etc/passwd"),
            (6, "/etc/subuid gives away ids of it (\"root:3000000:65536\")"),
            (7, "/no/such/place, named in hide"),
            (10, "slot a: the group away is not in /etc/group"),
            (10, "slot a: a job must not be in group root"),
            (12, "slot a: /no/such/directory cannot be used"),
            (12, "slot a: /etc/passwd is not a directory"),
            (13, "slot a: /dev/no-such-device cannot be used"),
        ];
        assert_eq!(found.len(), expected.len(), "{found:#?}");
        for ((line, message), (at, part)) in found.iter().zip(expected) {
            assert!(
                *line == at && message.contains(part),
                "{line}: {message}, expected {at}: {part}"
            );
        }
    }

    #[test]
    fn the_agents_certificates_are_a_file_that_jobs_see() {
        let here = "baseurl = \"http://localhost\"";
        for (path, part) in [
            ("/etc/passwd", None),
            (
                "/no/such/file",
                Some("SSL_CERT_FILE: /no/such/file cannot be used"),
            ),
            ("/etc", Some("is not a file")),
            ("/root/ca.pem", Some("is below /root, which no job sees")),
            ("/usr/ca.pem", Some("is below /usr, which no job sees")),
        ] {
            let hide = if path.starts_with("/usr") {
                "hide = [\"/usr\"]\n"
            } else {
                "\n"
            };
            let found = mistakes(&text(
                here,
                &format!("{hide}agent_env.SSL_CERT_FILE = \"{path}\""),
                "",
            ));
            match part {
                None => assert_eq!(found, [], "{path}"),
                Some(part) => {
                    let (line, message) = &found[0];
                    assert!(*line == 6 && message.contains(part), "{path}: {found:?}");
                }
            }
        }
    }

    #[test]
    fn a_file_that_differs_from_what_is_in_use_is_noticed_however_it_changes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        let here = "baseurl = \"http://localhost\"";
        let write = |path: &Path, slot: &str| {
            fs::write(path, text(here, "", slot)).unwrap();
        };
        write(&path, "");
        let in_use = parse(&text(here, "", "")).unwrap();
        let mut file = FileOnDisk::new(path.clone());
        assert_eq!(file.difference(&in_use), None);
        write(&path, "# a remark");
        assert_eq!(file.difference(&in_use), None);
        let variables = text(here, "agent_env.SSL_CERT_FILE = \"/ca\"", "");
        fs::write(&path, &variables).unwrap();
        assert!(
            file.difference(&in_use)
                .unwrap()
                .starts_with("factory.agent_env of")
        );
        assert_eq!(file.difference(&parse(&variables).unwrap()), None);
        fs::write(&path, text("baseurl = \"http://localhost:2\"", "", "")).unwrap();
        assert!(
            file.difference(&in_use)
                .unwrap()
                .starts_with("general.baseurl of")
        );
        write(&path, "hold_on_failure = false");
        assert!(file.difference(&in_use).unwrap().contains("have changed"));
        let changed = parse(&text(here, "", "hold_on_failure = false")).unwrap();
        assert_eq!(file.difference(&changed), None);
        // As editors do.
        let new = dir.path().join("new");
        write(&new, "");
        fs::rename(&new, &path).unwrap();
        assert!(file.difference(&changed).is_some() && file.difference(&in_use).is_none());
        write(&path, "no = \"such key\"");
        let told = file.difference(&in_use).unwrap();
        assert!(told.contains("config.toml:8: ") && told.contains("no"), "{told}");
        fs::remove_file(&path).unwrap();
        assert!(file.difference(&in_use).unwrap().contains("cannot be loaded"));
        write(&path, "");
        assert_eq!(file.difference(&in_use), None);
    }

    #[test]
    fn a_number_is_a_user_without_an_account() {
        assert_eq!(
            mistakes(&text("baseurl = \"http://localhost\"", "user = 61234", "")),
            []
        );
    }

    #[test]
    fn a_configuration_that_others_may_write_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let installed = root.path().join(CONFIG_PATH);
        fs::create_dir_all(installed.parent().unwrap()).unwrap();
        let draft = root.path().join("draft.toml");
        for path in [&installed, &draft] {
            let text = text("baseurl = \"http://localhost\"", "user = 7", "");
            fs::write(path, text).unwrap();
            for (mode, is_fine) in [(0o644, true), (0o664, *path == draft), (0o646, false)] {
                fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
                let loaded = load(path, root.path());
                assert_eq!(loaded.is_ok(), is_fine, "{} {mode:o}: {loaded:?}", path.display());
            }
        }
        fs::set_permissions(&installed, fs::Permissions::from_mode(0o644)).unwrap();
        fs::set_permissions(installed.parent().unwrap(), fs::Permissions::from_mode(0o777)).unwrap();
        let refused = load(&installed, root.path()).unwrap_err();
        assert!(refused[0].message.contains("chmod go-w"), "{refused:?}");
    }
}
