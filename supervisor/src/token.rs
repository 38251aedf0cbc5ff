//! The factory's token: where it is read, and the one in use. A new one is taken without a restart.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use protocol::config::Config;

/// The name of the factory's token among the credentials of the unit.
const CREDENTIAL: &str = "token";
/// Where systemd keeps the credentials of the packaged unit, below the root directory: for root, and the unit's user.
const OF_THE_UNIT: &str = "run/credentials/buildomat-user-factory.service/token";

/// The factory's token. No formatting prints it.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// The text is not checked: see [`TokenPlaces::read`].
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// For the server alone.
    pub(crate) fn text(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// Where a token was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// What systemd has passed on (`LoadCredential=token:…`).
    Credential(PathBuf),
    /// The file that the configuration names.
    File(PathBuf),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Credential(path) => write!(f, "the credential {}", path.display()),
            Source::File(path) => write!(f, "the file {}", path.display()),
        }
    }
}

/// Where a token may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenPlaces {
    /// A file that need not exist.
    credential: Option<PathBuf>,
    file: PathBuf,
}

impl TokenPlaces {
    /// Those of this process: what systemd has passed to it comes before the file of the configuration.
    pub fn of_this_process(config: &Config) -> TokenPlaces {
        let passed = std::env::var_os("CREDENTIALS_DIRECTORY").map(|dir| Path::new(&dir).join(CREDENTIAL));
        TokenPlaces {
            credential: passed,
            file: config.factory.token_file.as_path().to_owned(),
        }
    }

    /// Those of the running unit, for an operator's command that systemd has passed nothing to.
    pub fn of_the_unit(config: &Config, root: &Path) -> TokenPlaces {
        let mut places = TokenPlaces::of_this_process(config);
        places.credential.get_or_insert_with(|| root.join(OF_THE_UNIT));
        places
    }

    /// The token, and where it was read. The file may be closed to this user where there is a credential, and usually is.
    ///
    /// # Errors
    /// Where there is none, or two that differ; where a file is empty, no token, or anybody's to read.
    pub fn read(&self) -> Result<(Token, Source)> {
        let credential = self.credential.as_ref();
        let Some(credential) = credential.filter(|path| can_read(path) && !is_empty(path)) else {
            return Ok((read(&self.file)?, Source::File(self.file.clone())));
        };
        let token = read(credential)?;
        if can_read(&self.file) && read(&self.file)? != token {
            bail!(
                "the credential {} and factory.token_file {} hold different tokens: restart buildomat-user-factory.service \
                 if the file is newer, or remove what is wrong",
                credential.display(),
                self.file.display()
            );
        }
        Ok((token, Source::Credential(credential.clone())))
    }
}

/// Is there a file that this user may read?
fn can_read(path: &Path) -> bool {
    let closed = |error: &io::Error| {
        matches!(
            error.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory | io::ErrorKind::PermissionDenied
        )
    };
    // Another error is reported when it is read.
    !File::open(path).is_err_and(|error| closed(&error))
}

/// The packaged unit passes on an empty credential where there is no token file.
fn is_empty(path: &Path) -> bool {
    let mut start = Vec::new();
    let read = File::open(path).and_then(|file| file.take(4096).read_to_end(&mut start));
    read.is_ok() && start.trim_ascii().is_empty()
}

/// The token in a file.
fn read(path: &Path) -> Result<Token> {
    let name = path.display();
    let mut file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            bail!("there is no token file {name}: write the factory's token into it, and close it to others")
        }
        opened => opened.with_context(|| {
            format!("the token file {name} cannot be read: give it to the supervisor's user")
        })?,
    };
    let mode = file
        .metadata()
        .with_context(|| format!("the token file {name} cannot be examined"))?;
    if mode.permissions().mode() & 0o007 != 0 {
        bail!(
            "the token file {name} is open to everybody: run chmod o= {name}, and ask for a new token if others use this host"
        );
    }
    let mut text = String::new();
    file.by_ref()
        .take(4096)
        .read_to_string(&mut text)
        .with_context(|| format!("the token file {name} is no text"))?;
    let text = text.trim();
    if text.is_empty() {
        bail!("the token file {name} is empty: write the factory's token into it");
    }
    if !text.bytes().all(|b| b.is_ascii_graphic()) {
        bail!("the token file {name} holds more than one word: write the factory's token alone into it");
    }
    Ok(Token::new(text.to_owned()))
}

/// The token in use. Clones share it.
#[derive(Clone, Debug)]
pub struct TokenStore(Arc<Mutex<Current>>);

#[derive(Debug)]
struct Current {
    places: TokenPlaces,
    token: Token,
    source: Source,
}

impl TokenStore {
    /// # Errors
    /// As of [`TokenPlaces::read`].
    pub fn open(places: TokenPlaces) -> Result<TokenStore> {
        let (token, source) = places.read()?;
        Ok(TokenStore(Arc::new(Mutex::new(Current {
            places,
            token,
            source,
        }))))
    }

    /// One that is never read again.
    #[cfg(test)]
    pub(crate) fn fixed(token: &str) -> TokenStore {
        let file = PathBuf::from("/nowhere");
        TokenStore(Arc::new(Mutex::new(Current {
            places: TokenPlaces {
                credential: None,
                file: file.clone(),
            },
            token: Token::new(token.into()),
            source: Source::File(file),
        })))
    }

    /// The one in use.
    pub fn token(&self) -> Token {
        self.lock().token.clone()
    }

    /// Where that one was read.
    pub fn source(&self) -> Source {
        self.lock().source.clone()
    }

    /// Read it again, at this configuration's places. True where it is another one than before.
    ///
    /// # Errors
    /// Those of [`TokenPlaces::read`]; the token in use then stays.
    pub fn reload(&self, config: &Config) -> Result<bool> {
        self.read_at(TokenPlaces::of_this_process(config))
    }

    /// Read the token again from where it was read last: the present one was refused.
    ///
    /// # Errors
    /// Those of [`Self::reload`].
    pub fn read_again(&self) -> Result<bool> {
        let places = self.lock().places.clone();
        self.read_at(places)
    }

    fn read_at(&self, places: TokenPlaces) -> Result<bool> {
        let (token, source) = places.read()?;
        let mut current = self.lock();
        let is_new = current.token != token;
        if is_new {
            tracing::info!("a new token is in use, of {source}");
        }
        *current = Current {
            places,
            token,
            source,
        };
        Ok(is_new)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Current> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn write(path: &Path, text: &str, mode: u32) {
        fs::write(path, text).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_token_is_trimmed_and_an_open_or_empty_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        let set = |text: &str, mode: u32| {
            write(&path, text, mode);
            read(&path)
        };
        assert_eq!(set("  abc\n", 0o640).unwrap(), Token::new("abc".into()));
        for (text, mode, part) in [
            ("abc", 0o644, "everybody"),
            (" \n", 0o600, "empty"),
            ("a b", 0o600, "one word"),
        ] {
            let error = set(text, mode).unwrap_err().to_string();
            assert!(error.contains(part) && !error.contains("abc"), "{error}");
        }
    }

    #[test]
    fn the_token_is_never_printed() {
        let store = TokenStore::fixed("secret");
        for text in [format!("{:?}", store.token()), format!("{store:?}")] {
            assert!(!text.contains("secret"), "{text}");
        }
    }

    #[test]
    fn a_credential_and_a_file_may_both_be_there_where_they_hold_the_same_token() {
        let dir = tempfile::tempdir().unwrap();
        let (credential, file) = (dir.path().join("credential"), dir.path().join("file"));
        let places = TokenPlaces {
            credential: Some(credential.clone()),
            file: file.clone(),
        };
        let error = places.read().unwrap_err().to_string();
        assert!(error.contains("there is no token file"), "{error}");
        // The packaged unit's where there is no file for it.
        write(&credential, "\n", 0o400);
        let error = places.read().unwrap_err().to_string();
        assert!(
            error.contains("there is no token file") && error.contains("/file"),
            "{error}"
        );
        write(&file, "one", 0o600);
        assert_eq!(
            places.read().unwrap(),
            (Token::new("one".into()), Source::File(file.clone()))
        );
        fs::remove_file(&credential).unwrap();
        write(&credential, "one\n", 0o400);
        let both = places.read().unwrap();
        assert_eq!(
            both,
            (Token::new("one".into()), Source::Credential(credential.clone()))
        );
        write(&file, "two", 0o600);
        let error = places.read().unwrap_err().to_string();
        for part in ["/credential ", "/file ", "different tokens", "restart"] {
            assert!(error.contains(part), "{error}");
        }
        assert!(!error.contains("one") && !error.contains("two"), "{error}");
        // It need not be there.
        fs::remove_file(&file).unwrap();
        assert_eq!(places.read().unwrap(), both);
        // Where it is, it is no secret kept in two ways.
        write(&file, "one", 0o644);
        assert!(places.read().is_err());
    }

    #[test]
    fn a_new_token_is_taken_and_a_wrong_one_leaves_the_last() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("token");
        write(&file, "one", 0o600);
        let store = TokenStore::open(TokenPlaces {
            credential: None,
            file: file.clone(),
        });
        let (store, other) = (store.as_ref().unwrap(), store.as_ref().unwrap().clone());
        assert!(!store.read_again().unwrap());
        write(&file, "two", 0o600);
        assert!(store.read_again().unwrap());
        assert_eq!(other.token(), Token::new("two".into()));
        write(&file, "", 0o600);
        assert!(store.read_again().is_err());
        assert_eq!(other.token(), Token::new("two".into()));
        assert_eq!(other.source().to_string(), format!("the file {}", file.display()));
    }
}
