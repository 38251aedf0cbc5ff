//! Which host a worker belongs to. Several hosts may use one factory's token by mistake, and the server then lists the
//! workers of all of them to each. So every host has an *instance id*, made once, and associates its workers with the
//! *owner tag* `SLOT@HOST/INSTANCE`: the host's name for readers, the instance id for the comparison.
//!
//! The id lies in the state directory, with the machine that it was made on: a directory that was copied to another
//! machine does not make that machine the owner of the first one's workers.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use protocol::SlotName;

use crate::store::Store;

/// The file in the state directory: `id ID`, and `machine ID` where the machine has one.
const FILE: &str = "instance";
const DIGITS: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
const ID_LENGTH: usize = 8;
/// What is kept of a host's name (`HOST_NAME_MAX` is 64).
const MAX_HOST: usize = 63;

/// Eight digits of Crockford's base 32, in lower case: 40 random bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstanceId(String);

impl InstanceId {
    /// None where it is anything else.
    pub fn parse(text: &str) -> Option<Self> {
        let fits = text.len() == ID_LENGTH && text.bytes().all(|byte| DIGITS.contains(&byte));
        fits.then(|| Self(text.to_owned()))
    }

    fn new() -> Result<Self> {
        let mut bytes = [0; ID_LENGTH];
        File::open("/dev/urandom")
            .and_then(|mut random| random.read_exact(&mut bytes))
            .context("no random number can be read from /dev/urandom")?;
        let digit = |byte: u8| char::from(DIGITS[usize::from(byte) % DIGITS.len()]);
        Ok(Self(bytes.into_iter().map(digit).collect()))
    }
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// This host, as it tags its workers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    host: String,
    instance: InstanceId,
}

/// Whose a worker is, by its `private` on the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// It is not associated yet.
    Nobody,
    /// This host, in this slot.
    Own(SlotName),
    /// Only a slot, from a release before owner tags. The host may be this one.
    SlotOnly(SlotName),
    /// Another host, or what is no owner tag at all: the text as it is.
    Other(String),
}

impl Identity {
    /// `host` is shown to operators; what is not a letter, digit, `.`, `-` or `_` in it is replaced by `-`.
    pub fn new(host: &str, instance: InstanceId) -> Self {
        let plain = |c: char| if is_plain(c) { c } else { '-' };
        let host: String = host.chars().take(MAX_HOST).map(plain).collect();
        let host = if host.is_empty() { "unnamed".into() } else { host };
        Self { host, instance }
    }

    /// The owner tag of a worker in this slot, `SLOT@HOST/INSTANCE`. The server lets it be set once.
    pub fn owner_tag(&self, slot: &SlotName) -> String {
        format!("{slot}@{self}")
    }

    /// `private` is what the server has as the worker's owner tag, which another factory may have written.
    pub fn owner(&self, private: Option<&str>) -> Owner {
        let Some(text) = private else {
            return Owner::Nobody;
        };
        let other = || Owner::Other(text.to_owned());
        let Some((slot, place)) = text.split_once('@') else {
            return text.parse().map_or_else(|_| other(), Owner::SlotOnly);
        };
        let parsed = place.split_once('/').and_then(|(host, instance)| {
            let fits = (1..=MAX_HOST).contains(&host.len()) && host.chars().all(is_plain);
            let slot: SlotName = slot.parse().ok()?;
            let instance = InstanceId::parse(instance)?;
            fits.then_some((slot, instance))
        });
        match parsed {
            Some((slot, instance)) if instance == self.instance => Owner::Own(slot),
            _ => other(),
        }
    }
}

fn is_plain(c: char) -> bool {
    c.is_ascii_alphanumeric() || ".-_".contains(c)
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.instance)
    }
}

/// What the file says.
enum StoredIdentity {
    Nothing,
    This(InstanceId),
    OtherMachine(InstanceId),
    Unreadable,
}

/// This host's identity: the one in the state directory `dir`, or a new one. `machine` is the machine's id, if it has
/// one; `store` is the one in `dir`.
///
/// A directory that comes from another machine brings that machine's workers in its database. They are forgotten here:
/// the machine may run still, and what this host would do about them would end its jobs.
///
/// # Errors
/// Where a file of the directory can be neither read nor written.
pub fn establish(dir: &Path, machine: Option<&str>, host: &str, store: &mut Store) -> Result<Identity> {
    let path = dir.join(FILE);
    let instance = match read(&path, machine)? {
        StoredIdentity::This(instance) => instance,
        StoredIdentity::Nothing => begin(dir, machine)?,
        StoredIdentity::Unreadable => {
            let instance = begin(dir, machine)?;
            tracing::error!(
                "{} has no instance id of this release: a new one, {instance}, was written. Workers of the server \
                 that carry the last one, and do not run here, are shown as another host's: see `user-factory status`",
                path.display()
            );
            instance
        }
        StoredIdentity::OtherMachine(before) => {
            // In this order: after a crash in between, the machine is still another one.
            let forgotten = store.forget_all().context("the database cannot be written")?;
            let instance = begin(dir, machine)?;
            tracing::error!(
                "the state directory {} comes from another machine (/etc/machine-id differs): this host has the new \
                 instance id {instance} instead of {before}, and leaves the workers of {before} alone ({forgotten} \
                 were in the database). If that machine is gone for good, delete each of them with `user-factory \
                 destroy WORKER --yes`; if this is a copy of it, give this host a factory and a token of its own",
                dir.display()
            );
            instance
        }
    };
    if machine.is_none() {
        tracing::warn!(
            "this host has no machine id: a copy of {} would not be noticed; run systemd-machine-id-setup",
            dir.display()
        );
    }
    Ok(Identity::new(host, instance))
}

fn read(path: &Path, machine: Option<&str>) -> Result<StoredIdentity> {
    let text = match fs::read(path) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(StoredIdentity::Nothing),
        Err(error) => {
            return Err(error).with_context(|| {
                format!(
                    "cannot read {}: let the supervisor's user read it",
                    path.display()
                )
            });
        }
    };
    let value = |name: &str| {
        let mut lines = text.lines().filter_map(|line| line.split_once(' '));
        lines.find(|(key, _)| *key == name).map(|(_, value)| value.trim())
    };
    let Some(instance) = value("id").and_then(InstanceId::parse) else {
        return Ok(StoredIdentity::Unreadable);
    };
    Ok(match (value("machine"), machine) {
        // Where one of the two is not known, nothing says that they differ.
        (Some(before), Some(now)) if before != now => StoredIdentity::OtherMachine(instance),
        _ => StoredIdentity::This(instance),
    })
}

/// Write a new id: whole, or not at all.
fn begin(dir: &Path, machine: Option<&str>) -> Result<InstanceId> {
    let instance = InstanceId::new()?;
    let machine = machine.map(|id| format!("machine {id}\n")).unwrap_or_default();
    let text = format!("id {instance}\n{machine}");
    let (path, part) = (dir.join(FILE), dir.join("instance.part"));
    let write = || -> std::io::Result<()> {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        let mut file = options.open(&part)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&part, &path)?;
        File::open(dir)?.sync_all()
    };
    write().with_context(|| {
        format!(
            "cannot write {}: let the supervisor's user write the directory, and make room on the disk",
            path.display()
        )
    })?;
    Ok(instance)
}

/// The machine's id (`machine-id(5)`) in a file; none while it has none.
pub fn machine_id(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let id = text.trim();
    let fits = id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    fits.then(|| id.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Storage;
    use protocol::{TargetId, WorkerId};

    fn identity(host: &str, instance: &str) -> Identity {
        Identity::new(host, InstanceId::parse(instance).unwrap())
    }

    #[test]
    fn a_mark_is_read_back_and_nothing_else_is_taken_for_one() {
        let here = identity("lab-3.example", "7q2mz4kd");
        let slot: SlotName = "bench-1".parse().unwrap();
        assert_eq!(here.owner_tag(&slot), "bench-1@lab-3.example/7q2mz4kd");
        let own = Owner::Own(slot.clone());
        assert_eq!(here.owner(Some(&here.owner_tag(&slot))), own);
        // The host may have been renamed since.
        assert_eq!(here.owner(Some("bench-1@old_name/7q2mz4kd")), own);
        assert_eq!(here.owner(None), Owner::Nobody);
        assert_eq!(here.owner(Some("bench-1")), Owner::SlotOnly(slot));
        let long = format!("bench-1@{}/7q2mz4kd", "a".repeat(64));
        for other in [
            "bench-1@lab-3.example/7q2mz4ke",
            "bench-1@lab-3.example",
            "bench-1@/7q2mz4kd",
            "bench-1@lab 3/7q2mz4kd",
            "bench-1@lab/3/7q2mz4kd",
            "bench-1@lab-3/7q2mz4kd ",
            "bench-1@lab-3/7Q2MZ4KD",
            "bench-1@lab-3/7q2mz4k",
            "@lab-3/7q2mz4kd",
            "Not A Slot@lab-3/7q2mz4kd",
            "not a slot",
            "",
            &long,
        ] {
            assert_eq!(
                here.owner(Some(other)),
                Owner::Other(other.to_owned()),
                "{other:?}"
            );
        }
    }

    #[test]
    fn any_host_name_makes_a_mark_that_is_read_back() {
        let slot: SlotName = "a".parse().unwrap();
        for host in ["", "a b/c@d\n", &"ä".repeat(99), "localhost"] {
            let here = identity(host, "00000000");
            let tag = here.owner_tag(&slot);
            assert_eq!(here.owner(Some(&tag)), Owner::Own(slot.clone()), "{tag}");
        }
    }

    fn store_with_a_worker(dir: &Path) -> Store {
        let mut store = Store::open(dir).unwrap();
        let worker = crate::reconcile::adopted(
            &crate::buildomat::ServerWorker {
                id: WorkerId::from_bits(1),
                target: TargetId::from_bits(1),
                private: None,
                bootstrap: None,
                online: true,
                hold: false,
                recycle: false,
            },
            "a".parse().unwrap(),
            crate::worker::Phase::Running { online: true },
            0,
        );
        store.save(&worker).unwrap();
        store.save_drain(None, Some(&Default::default())).unwrap();
        store
    }

    #[test]
    fn an_identity_stays_with_its_machine_and_a_copy_gets_another() {
        let (one, two) = ("1".repeat(32), "2".repeat(32));
        let dir = tempfile::tempdir().unwrap();
        let mut store = store_with_a_worker(dir.path());
        let mut of = |machine: Option<&str>| establish(dir.path(), machine, "h", &mut store).unwrap();
        let first = of(Some(&one));
        assert_eq!(of(Some(&one)), first);
        // A machine without an id cannot be told from another.
        assert_eq!(of(None), first);
        let copy = of(Some(&two));
        assert_ne!(copy, first);
        assert_eq!(of(Some(&two)), copy);
        assert!(
            store.workers().unwrap().is_empty(),
            "the first machine's are kept"
        );
        assert!(
            store.drained().unwrap().contains_key(&None),
            "what was drained is resumed"
        );
    }

    #[test]
    fn a_damaged_file_makes_a_new_identity_and_forgets_no_worker() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = store_with_a_worker(dir.path());
        let mut of = || establish(dir.path(), None, "h", &mut store).unwrap();
        let first = of();
        for text in ["", "id\n", "id 7Q2MZ4KD\n", "\0\0\0"] {
            fs::write(dir.path().join(FILE), text).unwrap();
            let second = of();
            assert_ne!(second, first, "{text:?}");
            assert_eq!(of(), second, "{text:?}");
        }
        assert_eq!(store.workers().unwrap().len(), 1);
    }

    #[test]
    fn only_a_whole_machine_id_is_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("machine-id");
        assert_eq!(machine_id(&path), None);
        for (text, is_one) in [
            ("", false),
            ("uninitialized\n", false),
            ("0123456789abcdef0123456789abcde\n", false),
            ("0123456789abcdef0123456789abcdef\n", true),
        ] {
            fs::write(&path, text).unwrap();
            assert_eq!(machine_id(&path).is_some(), is_one, "{text:?}");
        }
    }
}
