//! Which device nodes of the host a slot's jobs may use.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer};

use super::value::{HostPath, text};

/// A path below `/dev`, in whose parts `*` stands for any characters and `?` for one. If it names a
/// directory, all device nodes below that are meant.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DevicePattern(PathBuf);

impl DevicePattern {
    /// Does it mean exactly one node, which must be there when a job starts? Others may come and go.
    pub fn is_plain(&self) -> bool {
        !self.0.as_os_str().as_bytes().iter().any(|b| b"*?".contains(b))
    }

    /// The pattern without `/dev/`.
    pub fn below_dev(&self) -> &Path {
        self.0
            .strip_prefix("/dev")
            .expect("it was checked to be below /dev")
    }

    /// Is `path`, a path below `/dev`, meant: itself, or as something in a directory that is?
    pub fn matches(&self, path: &Path) -> bool {
        let mut parts = path.iter();
        self.below_dev()
            .iter()
            .all(|pattern| parts.next().is_some_and(|part| matches_part(pattern, part)))
    }

    /// May something below the directory `path` (itself below `/dev`) be meant?
    pub fn leads_through(&self, path: &Path) -> bool {
        let mut patterns = self.below_dev().iter();
        path.iter()
            .all(|part| patterns.next().is_none_or(|pattern| matches_part(pattern, part)))
    }
}

impl fmt::Display for DevicePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.display().fmt(f)
    }
}

/// Linear in the product of the lengths: after a `*`, the last one is all that is ever tried again.
fn matches_part(pattern: &OsStr, part: &OsStr) -> bool {
    let (pattern, part) = (pattern.as_bytes(), part.as_bytes());
    let (mut p, mut t) = (0, 0);
    let mut retry = None;
    while t < part.len() {
        match pattern.get(p) {
            Some(b'*') => {
                retry = Some((p + 1, t));
                p += 1;
            }
            Some(b) if *b == b'?' || *b == part[t] => (p, t) = (p + 1, t + 1),
            _ => match retry {
                Some((after, from)) => {
                    retry = Some((after, from + 1));
                    (p, t) = (after, from + 1);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|b| *b == b'*')
}

impl<'de> Deserialize<'de> for DevicePattern {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        text(from, |text| {
            let path = HostPath::parse(text)?;
            let first = path
                .as_path()
                .strip_prefix("/dev")
                .ok()
                .and_then(|rest| rest.iter().next());
            match first {
                None => Err(format!(
                    "{path} is not below /dev: name a device node, or a pattern for some"
                )),
                // The whole of /dev is the host.
                Some(first) if first.as_bytes().iter().all(|b| b"*?".contains(b)) => Err(format!(
                    "{path} means every device of the host: name those that the job needs"
                )),
                Some(_) => Ok(DevicePattern(path.as_path().into())),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(text: &str) -> DevicePattern {
        #[derive(Deserialize)]
        struct One {
            device: DevicePattern,
        }
        toml::from_str::<One>(&format!("device = {text:?}"))
            .unwrap()
            .device
    }

    #[test]
    fn patterns_mean_what_a_shell_would_and_directories_all_below() {
        for (text, path, meant) in [
            ("/dev/kvm", "kvm", true),
            ("/dev/kvm", "kvm2", false),
            ("/dev/ttyACM*", "ttyACM0", true),
            ("/dev/ttyACM*", "ttyACM", true),
            ("/dev/ttyACM*", "ttyS0", false),
            ("/dev/tty?CM*0", "ttyACM10", true),
            ("/dev/tty*A*0", "ttyAxA1A0", true),
            ("/dev/tty*A*0", "ttyAxA1A0b", false),
            ("/dev/bus/usb", "bus/usb/001/002", true),
            ("/dev/bus/usb", "bus/usb", true),
            ("/dev/bus/usb", "bus/usbx/001", false),
            ("/dev/bus/usb", "bus", false),
            ("/dev/bus/*/001", "bus/usb/001/004", true),
            ("/dev/bus/*/001", "bus/usb/002/004", false),
            ("/dev/serial/by-id/*", "serial/by-id/usb-x", true),
        ] {
            assert_eq!(pattern(text).matches(Path::new(path)), meant, "{text} {path}");
        }
        assert!(pattern("/dev/bus/usb").leads_through(Path::new("bus")));
        assert!(pattern("/dev/bus/usb").leads_through(Path::new("bus/usb/001")));
        assert!(!pattern("/dev/bus/usb").leads_through(Path::new("snd")));
        assert!(pattern("/dev/kvm").is_plain() && !pattern("/dev/tty*").is_plain());
    }
}
