//! What stands where HTTP and the helper's socket are: every call of the supervisor becomes an event of the
//! simulation, and its answer another.

use std::fs::File;
use std::io::Write;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};

use nix::sys::memfd::{MFdFlags, memfd_create};
use protocol::{Error, ErrorKind, Received, Reply, Request, VERSION, WorkerId, wire};
use supervisor::buildomat::{self, HttpRequest, Transport};
use supervisor::helper_client::{self, Connection, Connector};
use tokio::sync::{Notify, oneshot};

use crate::script::{CallKind, Mode};
use crate::simulation::Simulation;

/// What the supervisor asks.
#[derive(Clone, Debug)]
pub enum Ask {
    Server(HttpRequest),
    File,
    Helper(Request),
}

/// What comes back over HTTP.
pub type Page = Result<(u16, Vec<u8>), buildomat::Error>;

#[derive(Debug)]
pub enum SimulatedResponse {
    Page(Page),
    Packet(Result<Received, helper_client::Error>),
}

impl Ask {
    pub fn kind(&self) -> CallKind {
        match self {
            Ask::File => CallKind::File,
            Ask::Helper(request) => match request {
                Request::CreateUser { .. } => CallKind::CreateUser,
                Request::InstallAgent { .. } => CallKind::Install,
                Request::Attach { .. } | Request::Kill { .. } => CallKind::Attach,
                Request::Delete { .. } => CallKind::HostDelete,
                Request::List { after: Some(_) } => CallKind::ListMore,
                Request::Hello { .. } | Request::List { .. } | Request::Check => CallKind::List,
            },
            Ask::Server(call) => {
                let parts: Vec<&str> = call.path.split('/').skip(3).collect();
                match (call.method.as_str(), &parts[..]) {
                    ("GET", ["workers"]) => CallKind::Workers,
                    ("POST", ["lease"]) => CallKind::Lease,
                    ("POST", ["lease", _]) => CallKind::Renew,
                    ("POST", ["worker"]) => CallKind::Make,
                    ("PATCH", ["worker", _]) => CallKind::Associate,
                    ("DELETE", ["worker", _]) => CallKind::Delete,
                    ("POST", ["worker", _, "append"]) => CallKind::Append,
                    ("POST", ["worker", _, "fail"]) => CallKind::Fail,
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

/// The simulation, and the word that something in it has changed.
#[derive(Clone, Debug)]
pub struct Shared {
    simulation: Arc<Mutex<Simulation>>,
    pub changed: Arc<Notify>,
}

impl Shared {
    pub fn new(simulation: Simulation) -> Self {
        Self {
            simulation: Arc::new(Mutex::new(simulation)),
            changed: Arc::default(),
        }
    }

    pub fn simulation(&self) -> MutexGuard<'_, Simulation> {
        self.simulation.lock().expect("no panic holds the simulation")
    }
}

/// One run's way out.
#[derive(Clone, Debug)]
pub struct Wire {
    pub shared: Shared,
    pub run: u64,
}

impl Wire {
    async fn ask(&self, ask: Ask) -> SimulatedResponse {
        let (sender, answer) = oneshot::channel();
        self.shared.simulation().send(self.run, ask, sender);
        self.shared.changed.notify_one();
        match answer.await {
            Ok(answer) => answer,
            // Nobody will ever answer: the caller's time limit ends it.
            Err(_) => std::future::pending().await,
        }
    }

    async fn page(&self, ask: Ask) -> Page {
        match self.ask(ask).await {
            SimulatedResponse::Page(page) => page,
            SimulatedResponse::Packet(_) => panic!("a packet for a page"),
        }
    }
}

impl Transport for Wire {
    fn call(&self, call: HttpRequest) -> buildomat::Pending<'_, buildomat::HttpResponse> {
        Box::pin(async {
            let (code, body) = self.page(Ask::Server(call)).await?;
            Ok(buildomat::HttpResponse::new(code, body))
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
        if self.shared.simulation().helper_mode_of(self.run) == Mode::Down {
            return Err(helper_client::Error::Unreachable(
                "the helper is unreachable: start the helper".into(),
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
                let mode = self.shared.simulation().helper_mode_of(self.run);
                return match mode {
                    Mode::Hung => std::future::pending().await,
                    Mode::Errors => Ok(packet_of(&error(ErrorKind::Busy, "try again later"), vec![])),
                    _ => Ok(packet_of(&Reply::Welcome, vec![])),
                };
            }
            match self.ask(Ask::Helper(request)).await {
                SimulatedResponse::Packet(packet) => packet,
                SimulatedResponse::Page(_) => panic!("a page for a packet"),
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
