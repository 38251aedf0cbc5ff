//! What stands where HTTP and the helper's socket are: every call of the supervisor becomes an event of the
//! world, and its answer another.

use std::fs::File;
use std::io::Write;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};

use nix::sys::memfd::{MFdFlags, memfd_create};
use protocol::{Error, ErrorKind, Received, Reply, Request, VERSION, WorkerId, wire};
use supervisor::buildomat::{self, Call, Transport};
use supervisor::helper_client::{self, Connection, Connector};
use tokio::sync::{Notify, oneshot};

use crate::script::{Kind, Mode};
use crate::world::World;

/// What the supervisor asks.
#[derive(Clone, Debug)]
pub enum Ask {
    Server(Call),
    File,
    Helper(Request),
}

/// What comes back over HTTP.
pub type Page = Result<(u16, Vec<u8>), buildomat::Error>;

#[derive(Debug)]
pub enum Answer {
    Page(Page),
    Packet(Result<Received, helper_client::Error>),
}

impl Ask {
    pub fn kind(&self) -> Kind {
        match self {
            Ask::File => Kind::File,
            Ask::Helper(request) => match request {
                Request::CreateUser { .. } => Kind::CreateUser,
                Request::InstallAgent { .. } => Kind::Install,
                Request::Attach { .. } | Request::Kill { .. } => Kind::Attach,
                Request::Delete { .. } => Kind::HostDelete,
                Request::List { after: Some(_) } => Kind::ListMore,
                Request::Hello { .. } | Request::List { .. } | Request::Check => Kind::List,
            },
            Ask::Server(call) => {
                let parts: Vec<&str> = call.path.split('/').skip(3).collect();
                match (call.method.as_str(), &parts[..]) {
                    ("GET", ["workers"]) => Kind::Workers,
                    ("POST", ["lease"]) => Kind::Lease,
                    ("POST", ["lease", _]) => Kind::Renew,
                    ("POST", ["worker"]) => Kind::Make,
                    ("PATCH", ["worker", _]) => Kind::Associate,
                    ("DELETE", ["worker", _]) => Kind::Delete,
                    ("POST", ["worker", _, "append"]) => Kind::Append,
                    ("POST", ["worker", _, "fail"]) => Kind::Fail,
                    _ => panic!("the simulated server has no {call:?}"),
                }
            }
        }
    }

    /// The worker, or the job, that it is about.
    pub fn about(&self) -> Option<WorkerId> {
        match self {
            Ask::File => None,
            Ask::Helper(request) => match request {
                Request::CreateUser { worker, .. }
                | Request::InstallAgent { worker, .. }
                | Request::Attach { worker }
                | Request::Kill { worker }
                | Request::Delete { worker } => Some(*worker),
                Request::Hello { .. } | Request::List { .. } | Request::Check => None,
            },
            Ask::Server(call) => match call.path.split('/').nth(4) {
                Some(id) => id.parse().ok(),
                None => call.body.as_ref()?["job"].as_str()?.parse().ok(),
            },
        }
    }
}

/// The world, and the word that something in it has changed.
#[derive(Clone, Debug)]
pub struct Shared {
    world: Arc<Mutex<World>>,
    pub changed: Arc<Notify>,
}

impl Shared {
    pub fn new(world: World) -> Self {
        Self {
            world: Arc::new(Mutex::new(world)),
            changed: Arc::default(),
        }
    }

    pub fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().expect("no panic holds the world")
    }
}

/// One life's way out.
#[derive(Clone, Debug)]
pub struct Wire {
    pub shared: Shared,
    pub life: u64,
}

impl Wire {
    async fn ask(&self, ask: Ask) -> Answer {
        let (sender, answer) = oneshot::channel();
        self.shared.world().send(self.life, ask, sender);
        self.shared.changed.notify_one();
        match answer.await {
            Ok(answer) => answer,
            // Nobody will ever answer: the caller's patience ends it.
            Err(_) => std::future::pending().await,
        }
    }

    async fn page(&self, ask: Ask) -> Page {
        match self.ask(ask).await {
            Answer::Page(page) => page,
            Answer::Packet(_) => panic!("a packet for a page"),
        }
    }
}

impl Transport for Wire {
    fn call(&self, call: Call) -> buildomat::Pending<'_, buildomat::Answer> {
        Box::pin(async {
            let (code, body) = self.page(Ask::Server(call)).await?;
            Ok(buildomat::Answer::new(code, body))
        })
    }

    fn file<'a>(
        &'a self,
        _path: &'a str,
        _query: &'a [(&'a str, String)],
        _headers: &'a [(&'static str, String)],
    ) -> buildomat::Pending<'a, reqwest::Response> {
        Box::pin(async {
            let (code, body) = self.page(Ask::File).await?;
            let response = http::Response::builder().status(code).body(body);
            Ok(response.expect("a status is a status").into())
        })
    }
}

impl Connector for Wire {
    fn connect(&self) -> Result<Box<dyn Connection>, helper_client::Error> {
        if self.shared.world().helper_mode_of(self.life) == Mode::Down {
            return Err(helper_client::Error::Away(
                "the helper is away: start the helper".into(),
            ));
        }
        Ok(Box::new(self.clone()))
    }
}

impl Connection for Wire {
    fn exchange<'a>(&'a self, packet: &'a [u8], fd: Option<BorrowedFd<'a>>) -> helper_client::Pending<'a> {
        Box::pin(async move {
            let request: Request = wire::decode(packet).expect("the supervisor's packet decodes");
            assert_eq!(fd.is_some(), request.carries_descriptor(), "{request:?}");
            if let Request::Hello { version } = request {
                assert_eq!(version, VERSION);
                let mode = self.shared.world().helper_mode_of(self.life);
                return match mode {
                    Mode::Hung => std::future::pending().await,
                    Mode::Errors => Ok(packet_of(&error(ErrorKind::Busy, "try again later"), vec![])),
                    _ => Ok(packet_of(&Reply::Welcome, vec![])),
                };
            }
            match self.ask(Ask::Helper(request)).await {
                Answer::Packet(packet) => packet,
                Answer::Page(_) => panic!("a page for a packet"),
            }
        })
    }
}

pub fn error(kind: ErrorKind, message: &str) -> Reply {
    Reply::Error(Error::new(kind, message))
}

pub fn packet_of(reply: &Reply, descriptors: Vec<OwnedFd>) -> Received {
    let bytes = wire::encode(reply).expect("a reply is encoded");
    Received::Packet { bytes, descriptors }
}

/// A reply of the helper, with its console where it has one.
pub fn reply_of(reply: &Reply, lines: usize) -> Received {
    let mut descriptors = Vec::new();
    if reply.carries_descriptor() {
        let mut console = File::from(memfd_create("console", MFdFlags::MFD_CLOEXEC).expect("a memfd"));
        let text: String = (0..lines).map(|n| format!("line {n}\n")).collect();
        console.write_all(text.as_bytes()).expect("written");
        descriptors.push(console.into());
    }
    packet_of(reply, descriptors)
}
