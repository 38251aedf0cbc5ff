//! Certificates of an authority that is made for a test.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::harness::tool;

/// What `openssl ca` wants to know. It can make a certificate that has expired, which other commands do not in each version.
const AUTHORITY: &str = "[ca]
default_ca = own
[own]
database = index
new_certs_dir = .
rand_serial = yes
unique_subject = no
default_md = sha256
policy = any
copy_extensions = copyall
x509_extensions = issued
certificate = ca.pem
private_key = ca.key
[any]
commonName = supplied
[issued]
authorityKeyIdentifier = keyid
";
/// From and to when a certificate is valid, in the form of ca(1).
pub const VALID: [&str; 2] = ["20200101000000Z", "20490101000000Z"];
/// The same of one that has expired.
pub const EXPIRED: [&str; 2] = ["20200101000000Z", "20200102000000Z"];

/// An authority, in `ca.pem` of a directory, and the certificate that it has issued last: `s.pem`, with its key in `s.key`.
#[derive(Debug)]
pub struct Certificates(tempfile::TempDir);

impl Certificates {
    /// A new authority.
    pub fn new() -> Certificates {
        let certificates = Certificates(tempfile::tempdir().expect("a directory"));
        certificates.openssl(
            "req -x509 -nodes -newkey rsa:2048 -keyout ca.key -out ca.pem -days 2 -subj /CN=ca \
             -addext keyUsage=critical,keyCertSign",
        );
        fs::write(certificates.path("ca.cnf"), AUTHORITY).expect("the directory is ours");
        fs::write(certificates.path("index"), "").expect("the directory is ours");
        certificates
    }

    /// Where the files are.
    pub fn directory(&self) -> &Path {
        self.0.path()
    }

    /// That of this file.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Issue a certificate for servers of these names, valid in this time.
    pub fn issue(&self, names: &[&str], [from, to]: [&str; 2]) {
        let names: Vec<String> = names.iter().map(|name| format!("DNS:{name}")).collect();
        self.openssl(&format!(
            "req -new -nodes -newkey rsa:2048 -keyout s.key -out s.csr -subj /CN=server -addext subjectAltName={}",
            names.join(",")
        ));
        self.openssl(&format!(
            "ca -batch -notext -config ca.cnf -in s.csr -startdate {from} -enddate {to} -out s.pem"
        ));
    }

    fn openssl(&self, words: &str) {
        let mut command = Command::new(tool("openssl"));
        let output = command
            .args(words.split(' '))
            .current_dir(self.0.path())
            .output()
            .expect("openssl can be started");
        assert!(
            output.status.success(),
            "{words}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

impl Default for Certificates {
    fn default() -> Self {
        Self::new()
    }
}
