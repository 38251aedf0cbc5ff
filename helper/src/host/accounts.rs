//! What the host's `/etc/passwd` and `/etc/group` say that matters here. They are read line by line, without NSS: no
//! module is loaded into this process.

use std::fs::File;
use std::io::Read;

use anyhow::Result;
use protocol::Uid;

/// The most that the host's passwd or group file may have, in bytes.
const MAX_FILE: u64 = 64 << 20;

pub fn read_whole(file: &File) -> Result<String> {
    let mut bytes = Vec::new();
    file.take(MAX_FILE).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Up to here ids are the system's (`login.defs(5)`), and so is this one, `nobody`'s.
pub const LAST_OF_THE_SYSTEM: u32 = 999;
const NOBODY: u32 = 65534;

/// What the host's `/etc/passwd` and `/etc/group` say that matters here.
#[derive(Debug)]
pub struct Accounts {
    /// All uids and gids, in order.
    ids: Vec<u32>,
    /// The lines of the system's own accounts. Those of human users are not for jobs.
    pub passwd: String,
    pub group: String,
}

impl Accounts {
    pub fn read(passwd: &File, group: &File) -> Result<Accounts> {
        let mut accounts = Accounts {
            ids: Vec::new(),
            passwd: String::new(),
            group: String::new(),
        };
        for (file, kept) in [(passwd, &mut accounts.passwd), (group, &mut accounts.group)] {
            for line in read_whole(file)?.lines() {
                let Some(id) = line.split(':').nth(2).and_then(|id| id.parse().ok()) else {
                    continue;
                };
                accounts.ids.push(id);
                if id <= LAST_OF_THE_SYSTEM || id == NOBODY {
                    *kept += line;
                    *kept += "\n";
                }
            }
        }
        accounts.ids.sort_unstable();
        Ok(accounts)
    }

    /// Is this number a uid or gid of the host?
    pub fn has(&self, uid: Uid) -> bool {
        self.ids.binary_search(&uid.get()).is_ok()
    }
}
