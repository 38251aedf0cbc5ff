//! The configuration: one root-owned file, read by supervisor and helper.
//!
//! Parsing is pure. What can be known from the text alone is refused here, each mistake with its line;
//! what depends on the host (do these groups and directories exist?) is asked by who can see it.
//!
//! ```
//! let text = r#"
//! [general]
//! baseurl = "https://buildomat.example.com"
//! [factory]
//! token_file = "/etc/buildomat-user-factory/token"
//! [slots.bench-1]
//! target = "01HZX3N8Q4J5K6M7P8R9S0T1V2"
//! add_to_groups = ["plugdev"]
//! "#;
//! let config = protocol::config::Config::parse(text).unwrap();
//! assert_eq!(config.slots.len(), 1);
//!
//! let mistakes = protocol::config::Config::parse(&text.replace("plugdev", "../x")).unwrap_err();
//! assert_eq!(mistakes[0].line, 8);
//! ```

pub mod accounts;
mod devices;
mod limits;
mod network;
mod usb;
mod value;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use serde::Deserialize;
use serde::de::IgnoredAny;
use toml::Spanned;

use crate::{SlotName, Target};

pub use devices::DevicePattern;
pub use limits::{Cpus, Limits, MAX_CONSOLE_BYTES, MinFree, core_goes_to_a_socket};
pub use network::{
    Destination, Egress, HTTP_PROXY, Host, MAX_CONNECTION_NAME, MAX_DESTINATIONS, TO_HTTP_PROXY, TO_SERVER,
};
pub use usb::{MAX_USB_ENTRIES, PortName, UsbEntry, UsbName};
pub use value::{
    AgentEnvName, BaseUrl, EnvName, EnvValue, GroupName, HELPER_VARIABLES, HostName, HostPath, PRIVATE_DIRS,
    ProxyUrl, Script, SocketFamily, UidRange, User,
};

/// The configuration's place below the root directory.
pub const CONFIG_PATH: &str = "etc/buildomat-user-factory/config.toml";
/// The directory of the sockets, below the root directory.
pub const RUN_DIR: &str = "run/buildomat-user-factory";
/// The file in which the helper writes the path of the directory of workers' cgroups.
pub const CGROUP_FILE: &str = "run/buildomat-user-factory/helper.cgroup";
/// The helper's socket, below the root directory.
pub const HELPER_SOCKET: &str = "run/buildomat-user-factory/helper.sock";
/// The directory, below the root directory, in which the supervisor listens for jobs without the
/// host's network: the helper makes it and gives it to the supervisor. Jobs' first processes have it by descriptor. To all
/// others but the supervisor's group it is closed, by the mode of the directory that it is in.
pub const PROXY_DIR: &str = "run/buildomat-user-factory/egress/jobs";
/// The name of that socket, of type `SOCK_SEQPACKET`. One packet brings one descriptor, a TCP connection that a job has
/// opened, and the connection's name: [`TO_SERVER`], [`TO_HTTP_PROXY`] or a [`Destination`].
pub const PROXY_SOCKET: &str = "server.sock";
/// The directory, below the root directory, in which the supervisor listens for the operator's command: made and
/// given away in the same way.
pub const CONTROL_DIR: &str = "run/buildomat-user-factory/control";
/// The name of that socket, which speaks HTTP.
pub const CONTROL_SOCKET: &str = "control.sock";
/// The field of a worker's user record in the host's userdb that has its slot's name.
pub const USERDB_SLOT: &str = "buildomatSlot";
/// The directory of all lasting state, below the root directory.
pub const STATE_DIR: &str = "var/lib/buildomat-user-factory";

/// A configuration without mistakes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// `[general]`.
    pub general: General,
    /// `[factory]`.
    pub factory: Factory,
    /// `[slots.NAME]`, at least one.
    pub slots: BTreeMap<SlotName, Slot>,
}

/// The server, and the way to it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct General {
    /// Where the buildomat server is: `http://` or `https://`, without a query.
    pub baseurl: BaseUrl,
    /// May `http://` lead to another host? The token and the agent's program are then sent unencrypted.
    #[serde(default)]
    pub allow_http: bool,
    /// The HTTP proxy through which supervisor, egress proxy and agents reach the server. None unless written: variables of the
    /// supervisor's environment name none.
    #[serde(default)]
    pub proxy: Option<ProxyUrl>,
}

/// What all slots of this host have in common.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Factory {
    /// The file with the factory's token; only the supervisor may be able to read it.
    pub token_file: HostPath,
    /// The user that the supervisor runs as: the helper serves nobody else. A name or a number.
    #[serde(default)]
    pub user: User,
    /// The uids (and gids) that workers get.
    #[serde(default)]
    pub uid_range: UidRange,
    /// Seconds between two polls of the server, 1 to 60.
    #[serde(default = "one", deserialize_with = "limits::between::<_, 1, 60>")]
    pub poll_seconds: u64,
    /// Seconds after which a worker whose agent has not come online is failed, 5 to 86400.
    #[serde(default = "five_minutes", deserialize_with = "limits::between::<_, 5, 86400>")]
    pub online_timeout_seconds: u64,
    /// Where the status page and the metrics can be had, besides the control socket: an address of the host and a
    /// port. Whoever reaches it may read them. Nowhere unless written.
    #[serde(default)]
    pub status_address: Option<SocketAddr>,
    /// Names of this host by which the status page may be asked, besides `localhost` and what `hostname` prints. An address
    /// is always taken.
    #[serde(default)]
    pub status_names: BTreeSet<HostName>,
    /// Directories of the host that no job sees, besides those that none ever sees. Each must exist; one that
    /// leads through a link hides what it leads to.
    #[serde(default)]
    pub hide: BTreeSet<HostPath>,
    /// Variables in the environment of each agent, which its tasks do not get.
    #[serde(default)]
    pub agent_env: BTreeMap<AgentEnvName, EnvValue>,
    /// The agent's program for all workers, in place of the server's: a file of the host that the supervisor may read.
    #[serde(default)]
    pub agent: Option<HostPath>,
    /// What must be free on the host for a job to be taken. Nothing is asked for unless written.
    #[serde(default)]
    pub min_free: MinFree,
    /// Is no job taken after a start of the supervisor before the self-test of all slots has passed?
    #[serde(default)]
    pub selftest_at_start: bool,
    /// Seconds that a shutdown of the host waits for jobs that run, 0 to 1500. systemd forces a reboot after half an hour.
    #[serde(default, deserialize_with = "limits::between::<_, 0, 1500>")]
    pub shutdown_wait_seconds: u64,
}

/// What one slot's jobs get.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slot {
    /// The target whose jobs it takes.
    pub target: Target,
    /// Groups of the host's `/etc/group` that the job's user is in.
    #[serde(default)]
    pub add_to_groups: BTreeSet<GroupName>,
    /// Slots that must be free while this one is busy. It works in both directions.
    #[serde(default)]
    pub conflicts_with_slots: BTreeSet<SlotName>,
    /// Variables in the environment of the agent's tasks.
    #[serde(default)]
    pub env: BTreeMap<EnvName, EnvValue>,
    /// Directories of the host (values) that the job sees, read-only, at another place (keys).
    #[serde(default)]
    pub read_only: BTreeMap<HostPath, HostPath>,
    /// Device nodes of the host that the job may read and write, also those that are plugged in later.
    #[serde(default)]
    pub devices: BTreeSet<DevicePattern>,
    /// USB devices that the job has, by what tells them and not by their nodes' names. Slots whose entries mean the same
    /// device are in each other's `conflicts_with_slots`.
    #[serde(default)]
    pub usb: BTreeMap<UsbName, UsbEntry>,
    /// More private writable places: empty at the start, gone at the end.
    #[serde(default)]
    pub writable: BTreeSet<HostPath>,
    /// `network`: what the job can reach without the host's network, which it has unless this is written. `"none"` names
    /// nothing but the server.
    #[serde(default, rename = "network", deserialize_with = "network::network")]
    pub egress: Option<Egress>,
    /// Families of sockets that the job may make, besides Unix, IPv4, IPv6 and netlink.
    #[serde(default)]
    pub socket_families: BTreeSet<SocketFamily>,
    /// May the job make user namespaces, and in them the other kinds, and mounts?
    #[serde(default)]
    pub allow_user_namespaces: bool,
    /// Are `fsync(2)` and its kin answered without being done? What a job writes ends with it, so nothing is
    /// lost; unless it writes to a disk of its own, so a slot with block devices has them done all the same.
    #[serde(default = "default_true")]
    pub ignore_sync: bool,
    /// How much the job may use; the helper does not start where the host cannot enforce one of them.
    #[serde(default)]
    pub limits: Limits,
    /// The nice value of the job's processes, 0 to 19 (`setpriority(2)`): the higher, the less of a busy processor they get.
    #[serde(default, deserialize_with = "limits::nice")]
    pub nice: u8,
    /// A bash script that the agent runs, as the job's user, before the job. If it fails, the worker is failed.
    pub pre_job_diagnostic_script: Option<Script>,
    /// The same after the job. If it fails, the worker is held.
    pub post_job_diagnostic_script: Option<Script>,
    /// Seconds from when the agent is online until its worker is failed, if it is not done by then: 10 to 31536000.
    #[serde(default, deserialize_with = "limits::maybe_between::<_, 10, 31_536_000>")]
    pub job_timeout_seconds: Option<u64>,
    /// Is a worker that the factory has failed kept until an operator releases it? Otherwise its console goes to the
    /// job's log, and it is deleted.
    #[serde(default = "default_true")]
    pub hold_on_failure: bool,
    /// Do the processes of a failed worker go on while it is kept? They are ended unless this is set.
    #[serde(default)]
    pub keep_processes: bool,
    /// The line on which the slot begins, for messages.
    #[serde(skip)]
    pub line: usize,
}

/// One mistake in the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// Beginning with 1.
    pub line: usize,
    /// What is wrong, on one line. It begins with `slot NAME: ` where it is about one.
    pub message: String,
}

/// Two slots that mean the same USB device, each with its entry.
pub type UsbConflict<'a> = [(&'a SlotName, &'a UsbName); 2];

/// The most entries for USB devices that a configuration has in all.
const MAX_USB_ENTRIES_OF_ALL: usize = 1024;

/// The slots that mean the same USB device by the same words.
pub fn usb_conflicts(slots: &BTreeMap<SlotName, Slot>) -> Vec<UsbConflict<'_>> {
    let mut all: Vec<(&SlotName, &UsbName, &UsbEntry)> = Vec::new();
    for (slot, of) in slots {
        all.extend(of.usb.iter().map(|(name, entry)| (slot, name, entry)));
    }
    let mut conflicts = Vec::new();
    for (number, (slot, name, entry)) in all.iter().enumerate() {
        for (other, other_name, other_entry) in &all[number + 1..] {
            if slot != other && entry.means_same(other_entry) {
                conflicts.push([(*slot, *name), (*other, *other_name)]);
            }
        }
    }
    conflicts
}

impl Slot {
    /// Has it devices of the host?
    pub fn has_devices(&self) -> bool {
        !self.devices.is_empty() || !self.usb.is_empty()
    }
}

impl Config {
    /// Do these slots exclude each other? It is enough that one of them says so.
    pub fn are_conflicting(&self, a: &SlotName, b: &SlotName) -> bool {
        let lists = |x: &SlotName, y: &SlotName| {
            self.slots
                .get(x)
                .is_some_and(|slot| slot.conflicts_with_slots.contains(y))
        };
        lists(a, b) || lists(b, a)
    }

    /// # Errors
    /// Every mistake that can be told from the text: the first only where it is not even TOML of this form.
    pub fn parse(text: &str) -> Result<Config, Vec<Mistake>> {
        let line_of = |offset: usize| 1 + text.bytes().take(offset).filter(|b| *b == b'\n').count();
        let mistake = |error: toml::de::Error| {
            let message = error.message().trim().replace('\n', " ");
            vec![Mistake {
                line: error.span().map_or(1, |span| line_of(span.start)),
                message,
            }]
        };
        let raw: RawConfig = toml::from_str(text).map_err(mistake)?;
        let spans: Spans = toml::from_str(text).map_err(mistake)?;
        let mut mistakes = Vec::new();
        if raw.slots.is_empty() {
            mistakes.push(Mistake {
                line: 1,
                message: "there is no slot: add a table [slots.NAME]".into(),
            });
        }
        let (mut slots, mut entries) = (BTreeMap::new(), 0);
        for (name, mut checked) in raw.slots {
            let slot = &spans.slots[name.get_ref()];
            let mut note = |offset: usize, message: String| {
                mistakes.push(Mistake {
                    line: line_of(offset),
                    message: format!("slot {}: {message}", name.get_ref()),
                });
            };
            for other in &slot.conflicts_with_slots {
                let (start, other) = (other.span().start, other.get_ref());
                if other == name.get_ref() {
                    note(
                        start,
                        "it conflicts with itself: remove it from conflicts_with_slots".into(),
                    );
                } else if !spans.slots.contains_key(other) {
                    note(
                        start,
                        format!(
                            "conflicts_with_slots names {other}, which is no slot: define it or remove it"
                        ),
                    );
                }
            }
            let mut places: Vec<&HostPath> = Vec::new();
            let writable = slot.writable.iter().map(|place| (place, false));
            for (place, is_read_only) in writable.chain(slot.read_only.keys().map(|place| (place, true))) {
                let (start, place) = (place.span().start, place.get_ref());
                if let Err(why) = place.check_path_in_job(is_read_only) {
                    note(start, format!("{place} {why}"));
                }
                if places
                    .iter()
                    .any(|p| p.0.starts_with(&place.0) || place.0.starts_with(&p.0))
                {
                    note(
                        start,
                        format!(
                            "{place} is within, or contains, another path of writable or read_only: choose paths apart"
                        ),
                    );
                }
                places.push(place);
            }
            if let Some(egress) = &checked.egress {
                let start = slot.network.as_ref().map_or(0, |network| network.span().start);
                let server = &raw.general.baseurl;
                if server.name_and_port().is_none() {
                    note(
                        start,
                        format!(
                            "a network of the job's own needs a server with a name: {server} is an address, name the host in general.baseurl"
                        ),
                    );
                }
                let own = server.address_in_job();
                let own = own.map(|address| (address, "the buildomat server".to_owned()));
                let mut taken: BTreeMap<SocketAddr, String> = own.into_iter().collect();
                for (address, name) in egress.listeners(server) {
                    if let Some(other) = taken.insert(address, name.clone()) {
                        note(
                            start,
                            format!("{other} and {name} are both at {address} in a job: remove one of them"),
                        );
                    }
                }
                if let Some(families) = &slot.socket_families
                    && !checked.socket_families.is_empty()
                {
                    note(
                        families.span().start,
                        "socket_families needs network = \"host\": a network of the job's own has none of these devices, and a socket of AF_VSOCK would lead out of it".into(),
                    );
                }
            }
            entries += checked.usb.len();
            for entry in slot.usb.keys().skip(MAX_USB_ENTRIES) {
                note(
                    entry.span().start,
                    format!("it has more than {MAX_USB_ENTRIES} USB devices: name fewer"),
                );
            }
            if entries > MAX_USB_ENTRIES_OF_ALL {
                note(
                    name.span().start,
                    format!(
                        "all slots together have more than {MAX_USB_ENTRIES_OF_ALL} USB devices: name fewer"
                    ),
                );
            }
            checked.line = line_of(name.span().start);
            slots.insert(name.into_inner(), checked);
        }
        if mistakes.is_empty() {
            let conflicts = usb_conflicts(&slots).into_iter();
            let conflicts: Vec<[SlotName; 2]> =
                conflicts.map(|two| two.map(|(slot, _)| slot.clone())).collect();
            for [one, other] in conflicts {
                if let Some(slot) = slots.get_mut(&one) {
                    slot.conflicts_with_slots.insert(other);
                }
            }
            Ok(Config {
                general: raw.general,
                factory: raw.factory,
                slots,
            })
        } else {
            mistakes.sort_by_key(|mistake| mistake.line);
            Err(mistakes)
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConfig {
    general: General,
    factory: Factory,
    #[serde(default)]
    slots: BTreeMap<Spanned<SlotName>, Slot>,
}

/// The same text once more, for the places in it of what is compared with other values.
#[derive(Deserialize)]
struct Spans {
    #[serde(default)]
    slots: BTreeMap<SlotName, SlotSpans>,
}

#[derive(Deserialize)]
struct SlotSpans {
    #[serde(default)]
    conflicts_with_slots: Vec<Spanned<SlotName>>,
    #[serde(default)]
    read_only: BTreeMap<Spanned<HostPath>, HostPath>,
    #[serde(default)]
    writable: Vec<Spanned<HostPath>>,
    #[serde(default)]
    usb: BTreeMap<Spanned<UsbName>, IgnoredAny>,
    network: Option<Spanned<IgnoredAny>>,
    socket_families: Option<Spanned<IgnoredAny>>,
}

fn default_true() -> bool {
    true
}

fn one() -> u64 {
    1
}

fn five_minutes() -> u64 {
    300
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "[general]\nbaseurl = \"https://b.example.com\"\n[factory]\ntoken_file = \"/t\"\n";
    const SLOT: &str = "[slots.a]\ntarget = \"01HZX3N8Q4J5K6M7P8R9S0T1V2\"\n";

    fn mistakes(rest: &str) -> Vec<Mistake> {
        Config::parse(&format!("{HEAD}{rest}")).expect_err(rest)
    }

    #[test]
    fn a_whole_slot_parses() {
        let config = Config::parse(&format!(
            "{HEAD}{SLOT}add_to_groups = [\"plugdev\"]\nenv.A = \"1\"\nread_only = {{ \"/opt/rust\" = \"/root/.rustup\" }}\n\
             devices = [\"/dev/kvm\"]\nsocket_families = [\"AF_CAN\"]\nwritable = [\"/srv/cache\"]\nnice = 19\nconflicts_with_slots = [\"b\"]\n{}",
            SLOT.replace(".a", ".b")
        ))
        .unwrap();
        let (a, b) = ("a".parse().unwrap(), "b".parse().unwrap());
        assert!(
            config.are_conflicting(&a, &b)
                && config.are_conflicting(&b, &a)
                && !config.are_conflicting(&a, &a)
        );
        assert_eq!(config.slots[&a].line, 5);
        assert_eq!((config.slots[&a].nice, config.slots[&b].nice), (19, 0));
        assert_eq!(config.factory.min_free, MinFree::default());
        assert_eq!(config.factory.agent, None);
        assert!(!config.factory.selftest_at_start);
        assert_eq!(config.factory.shutdown_wait_seconds, 0);
        let range = config.factory.uid_range;
        assert_eq!((range.len(), range.last.get()), (65536, (1 << 21) - 1));
    }

    #[test]
    fn a_target_is_an_id_or_a_name() {
        let id = "01HZX3N8Q4J5K6M7P8R9S0T1V2";
        let target = |value: &str| {
            let config = Config::parse(&format!("{HEAD}{}", SLOT.replace(id, value))).unwrap();
            config.slots.into_values().next().unwrap().target
        };
        assert_eq!(target(id), Target::Id(id.parse().unwrap()));
        for name in ["hubris", "helios 2.0", "01HZX3N8Q4J5K6M7P8R9S0T1V"] {
            assert_eq!(target(name), Target::Name(name.parse().unwrap()));
        }
    }

    #[test]
    fn slots_that_mean_the_same_device_by_the_same_words_exclude_each_other() {
        for (a, b, same) in [
            ("serial = \"AB\"", "serial = \"ab\"", true),
            ("serial = \"AB\"", "serial = \"AC\"", false),
            ("port = \"1-2\"", "port = \"1-2\"", true),
            ("port = \"1-2\"", "port = \"1-2.1\"", false),
            (
                "vendor = \"0403\"",
                "vendor = \"0x0403\", product = \"6001\"",
                true,
            ),
            ("vendor = \"0403\"", "vendor = \"0d28\"", false),
            (
                "serial = \"A\", vendor = \"0403\"",
                "serial = \"B\", vendor = \"0403\"",
                false,
            ),
            ("serial = \"A\", vendor = \"0403\"", "vendor = \"0403\"", true),
            (
                "serial = \"A\", port = \"1-2\"",
                "serial = \"A\", port = \"pci-0000:00:14.0-usb-0:2\"",
                true,
            ),
            // That cannot be told from the text.
            ("port = \"1-2\"", "port = \"pci-0000:00:14.0-usb-0:2\"", false),
            ("serial = \"A\"", "port = \"1-2\"", false),
        ] {
            let text = format!(
                "{HEAD}{SLOT}usb.x = {{ {a} }}\n{}usb.y = {{ {b} }}\n{}",
                SLOT.replace(".a", ".b"),
                SLOT.replace(".a", ".c")
            );
            let config = Config::parse(&text).unwrap();
            let name = |text: &str| -> SlotName { text.parse().unwrap() };
            assert_eq!(config.are_conflicting(&name("a"), &name("b")), same, "{a} {b}");
            assert_eq!(config.are_conflicting(&name("b"), &name("a")), same, "{a} {b}");
            assert!(!config.are_conflicting(&name("a"), &name("c")));
            assert_eq!(usb_conflicts(&config.slots).len(), usize::from(same));
        }
        // Within a slot, several entries may mean one device.
        let text = format!("{HEAD}{SLOT}usb.x.port = \"1-2\"\nusb.y.port = \"1-2\"\n");
        assert!(
            Config::parse(&text)
                .unwrap()
                .slots
                .values()
                .all(|slot| slot.conflicts_with_slots.is_empty())
        );
    }

    #[test]
    fn what_must_be_free_is_a_size_or_a_number_each() {
        let parse = |value: &str| {
            let text = format!("{HEAD}min_free = {value}\n{SLOT}");
            Config::parse(&text).map(|config| config.factory.min_free)
        };
        let all = MinFree {
            disk: Some(10 << 30),
            inodes: Some(100 << 10),
            memory: Some(5),
        };
        assert_eq!(
            parse("{ disk = \"10G\", inodes = \"100K\", memory = 5 }"),
            Ok(all)
        );
        let disk = MinFree {
            inodes: None,
            memory: None,
            ..all
        };
        assert_eq!(parse("{ disk = \"10G\" }"), Ok(disk));
        for (bad, part) in [
            ("{ disk = 0 }", "at least 1"),
            ("{ disk = \"10%\" }", "is not a size"),
            ("{ disk = -1 }", "expected a size"),
            ("{ swap = 1 }", "unknown field"),
            ("\"10G\"", "invalid type"),
        ] {
            let found = parse(bad).expect_err(bad);
            assert!(found[0].line == 5 && found[0].message.contains(part), "{found:?}");
        }
    }

    fn too_many_destinations() -> Vec<String> {
        let ports = 1..=MAX_DESTINATIONS + 1;
        ports.map(|port| format!("a.example:{port}")).collect()
    }

    #[test]
    fn every_mistake_has_its_line_and_a_sentence() {
        for (text, line, part) in [
            (SLOT.replace("01HZX3N8Q4J5K6M7P8R9S0T1V2", ""), 6, "ULID"),
            (
                SLOT.replace("01HZX3N8Q4J5K6M7P8R9S0T1V2", " hubris"),
                6,
                "or its name",
            ),
            (
                SLOT.replace("01HZX3N8Q4J5K6M7P8R9S0T1V2", "01HZX3N8Q4J5K6M7P8R9S0T1VI"),
                6,
                "ULID",
            ),
            (
                SLOT.replace("01HZX3N8Q4J5K6M7P8R9S0T1V2", "01hzx3n8q4j5k6m7p8r9s0t1v2"),
                6,
                "ULID",
            ),
            (format!("{SLOT}colour = \"red\"\n"), 7, "unknown field"),
            (format!("{SLOT}conflicts_with_slots = [\"a\"]\n"), 7, "itself"),
            (format!("{SLOT}\nconflicts_with_slots = [\n\"zz\"]\n"), 9, "zz"),
            (format!("{SLOT}writable = [\"/tmp/x\"]\n"), 7, "/tmp"),
            (format!("{SLOT}writable = [\"opt\"]\n"), 7, "absolute"),
            (format!("{SLOT}writable = [\"/opt/../etc\"]\n"), 7, "absolute"),
            (format!("{SLOT}devices = [\"/etc/passwd\"]\n"), 7, "/dev"),
            (format!("{SLOT}devices = [\"/dev/*\"]\n"), 7, "every device"),
            (
                format!("{SLOT}usb.Probe = {{ serial = \"1\" }}\n"),
                7,
                "a lower-case letter first",
            ),
            (format!("{SLOT}usb.a = {{}}\n"), 7, "it tells no device"),
            (
                format!("{SLOT}\nusb.a = {{ product = \"6001\" }}\n"),
                8,
                "name the vendor",
            ),
            (
                format!("{SLOT}usb.a.vendor = \"403\"\n"),
                7,
                "four hexadecimal digits",
            ),
            (format!("{SLOT}usb.a.vendor = 403\n"), 7, "a string"),
            (format!("{SLOT}usb.a.serial = \"\"\n"), 7, "1 to 126 characters"),
            (
                format!("{SLOT}usb.a.port = \"usb1\"\n"),
                7,
                "user-factory devices",
            ),
            (
                format!("{SLOT}usb.a.port = \"pci-0000:00:14.0-usb-0:2.3:1.0\"\n"),
                7,
                "an interface of a device",
            ),
            (
                format!("{SLOT}usb.a = {{ serial = \"1\", seriall = \"2\" }}\n"),
                7,
                "unknown field",
            ),
            (
                format!("{SLOT}\nusb.a = {{ serial = \"1\", grace_seconds = 0 }}\n"),
                8,
                "1 to 86400",
            ),
            (
                format!("{SLOT}[slots.a.usb.a]\nserial = \"1\"\ngrace_seconds = 86401\n"),
                9,
                "1 to 86400",
            ),
            (
                format!("{SLOT}[slots.a.usb]\n")
                    + &(1..18)
                        .map(|n| format!("d{n}.port = \"1-{n}\"\n"))
                        .collect::<String>(),
                // Sorted by name, the last is d9.
                16,
                "more than 16",
            ),
            (
                format!("{SLOT}devices = [\n\"/dev/null\",\n\"/dev\"]\n"),
                9,
                "/dev",
            ),
            (
                format!("{SLOT}add_to_groups = [\n\"adm\",\n\"a b\"]\n"),
                9,
                "a group's name",
            ),
            (
                format!("{SLOT}network = \"lan\"\n"),
                7,
                "or a table with allow or audit",
            ),
            (format!("{SLOT}network.alow = []\n"), 7, "unknown field"),
            (
                format!("{SLOT}network = {{ allow = [\n\"a.example:443\",\n\"b.example\",\n] }}\n"),
                9,
                "its port is missing",
            ),
            (
                format!("{SLOT}[slots.a.network]\nallow = [\n\"https://a.example:443\",\n]\n"),
                9,
                "without a scheme",
            ),
            (
                format!("{SLOT}network.allow = {:?}\n", too_many_destinations()),
                7,
                "65 destinations are too many",
            ),
            (
                format!("{SLOT}network.allow = [\"b.example.com:22\", \"127.0.0.1:22\"]\n"),
                7,
                "are both at 127.0.0.1:22 in a job",
            ),
            (
                format!("{SLOT}network.allow = [\"127.0.0.1:443\"]\n"),
                7,
                "the buildomat server and 127.0.0.1:443 are both at",
            ),
            (
                format!("{SLOT}network.audit = true\nsocket_families = [\"AF_CAN\"]\n"),
                8,
                "network = \"host\"",
            ),
            (format!("{SLOT}limits.memory = 5\n"), 7, "at least"),
            (
                format!("{SLOT}socket_families = [\"AF_PACKET\"]\n"),
                7,
                "AF_CAN and AF_VSOCK are",
            ),
            (
                format!("{SLOT}network = \"none\"\nsocket_families = [\"AF_CAN\"]\n"),
                8,
                "network = \"host\"",
            ),
            (format!("{SLOT}job_timeout_seconds = 5\n"), 7, "10 to"),
            (format!("{SLOT}nice = 20\n"), 7, "0 to 19"),
            (format!("{SLOT}nice = -1\n"), 7, "invalid value"),
            (format!("{SLOT}pre_job_diagnostic_script = \"\"\n"), 7, "script"),
            ("agent_env.LANG = \"C\"\n".to_owned() + SLOT, 5, "the helper sets"),
            ("agent_env.\"A=B\" = \"C\"\n".to_owned() + SLOT, 5, "variable"),
            ("agent_env.A = \"a\\u0000b\"\n".to_owned() + SLOT, 5, "NUL"),
            (
                "status_address = \"localhost\"\n".to_owned() + SLOT,
                5,
                "socket address",
            ),
            (format!("{SLOT}limits.colour = 5\n"), 7, "unknown field"),
            (format!("{SLOT}add_to_groups = [\"a b\"]\n"), 7, "group"),
            (format!("{SLOT}env.\"1A\" = \"x\"\n"), 7, "variable"),
            (
                format!("{SLOT}read_only = {{ \"/srv/a\" = \"/x\", \"/srv/a/b\" = \"/y\" }}\n"),
                7,
                "apart",
            ),
            ("[slots.\"..\"]\n".into(), 5, "slot's name"),
            (String::new(), 1, "no slot"),
            ("uid_range = \"0-10\"\n".to_owned() + SLOT, 5, "range of uids"),
            ("agent = \"agent\"\n".to_owned() + SLOT, 5, "absolute path"),
            ("poll_seconds = 0\n".to_owned() + SLOT, 5, "1 to 60"),
            ("shutdown_wait_seconds = 1501\n".to_owned() + SLOT, 5, "0 to 1500"),
            ("[slots\n".into(), 5, ""),
        ] {
            let found = mistakes(&text);
            assert!(found[0].message.contains(part), "{text}: {found:?}");
            assert_eq!(found[0].line, line, "{text}: {found:?}");
        }
    }

    #[test]
    fn what_is_shown_may_be_in_run_beside_what_the_job_has_there_of_its_own() {
        for (key, place, is_good) in [
            ("read_only", "/run/nscd", true),
            ("read_only", "/run/systemd/resolve", true),
            ("read_only", "/run/locks", true),
            ("read_only", "/run", false),
            ("read_only", "/run/lock", false),
            ("read_only", "/run/user/1000", false),
            ("read_only", "/run/screen", false),
            ("read_only", "/run/buildomat/x", false),
            ("read_only", "/run/buildomat-agent", false),
            ("read_only", "/var/run/nscd", false),
            ("read_only", "/etc/x", false),
            ("writable", "/run/nscd", false),
        ] {
            let value = match key {
                "writable" => format!("[{place:?}]"),
                _ => format!("{{ {place:?} = \"/x\" }}"),
            };
            let parsed = Config::parse(&format!("{HEAD}{SLOT}{key} = {value}\n"));
            assert_eq!(parsed.is_ok(), is_good, "{key} {place}: {parsed:?}");
        }
    }

    #[test]
    fn a_user_is_a_name_or_a_number_with_or_without_quotes() {
        let user = |value: &str| {
            let text = format!("{HEAD}user = {value}\n{SLOT}");
            Config::parse(&text).map(|config| config.factory.user)
        };
        assert_eq!(user("61234"), Ok(User::Number(61234)));
        assert_eq!(user("\"61234\""), Ok(User::Number(61234)));
        assert_eq!(user("\"ci\""), Ok(User::Name("ci".into())));
        for bad in [
            "-1",
            "\"\"",
            "\"a b\"",
            "4294967295",
            "\"4294967295\"",
            "\"4294967296\"",
        ] {
            assert_eq!(user(bad).expect_err(bad)[0].line, 5, "{bad}");
        }
    }

    #[test]
    fn a_slot_without_network_needs_a_server_with_a_name() {
        for (server, name) in [
            ("https://b.example.com", Some(("b.example.com", 443))),
            ("http://b/path", Some(("b", 80))),
            ("http://127.0.0.1:8080", Some(("127.0.0.1", 8080))),
            ("http://localhost:1", Some(("localhost", 1))),
            ("http://10.0.0.1:8080", None),
            ("http://[::1]:8080", None),
            ("http://b:0", None),
            ("http://b:99999", None),
        ] {
            let text = format!("{HEAD}{SLOT}network = \"none\"\n").replace("https://b.example.com", server);
            let parsed = Config::parse(&text);
            match name {
                Some(name) => assert_eq!(parsed.unwrap().general.baseurl.name_and_port(), Some(name)),
                None => assert_eq!(parsed.unwrap_err()[0].line, 7, "{server}"),
            }
        }
    }

    #[test]
    fn addresses_that_could_be_options_or_carry_secrets_are_refused() {
        for bad in [
            "",
            "-x",
            "ftp://h",
            "https://",
            "https://h/",
            "https://u:p@h",
            "https://h?q",
            "https://h h",
        ] {
            let text = format!("{HEAD}{SLOT}").replace("https://b.example.com", bad);
            assert!(Config::parse(&text).is_err(), "{bad:?} parsed");
        }
        // What is refused is shown without what may be secret.
        for urls in [
            "\"https://user:secret@h\"",
            "\"https://b\"\nproxy = \"http://user:secret@h:1\"",
        ] {
            let text = format!("{HEAD}{SLOT}").replace("\"https://b.example.com\"", urls);
            let told = Config::parse(&text).unwrap_err().remove(0).message;
            assert!(told.contains("://…@h") && !told.contains("secret"), "{told}");
        }
    }
}
