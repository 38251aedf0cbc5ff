//! What can happen in a simulation. A script is nothing but a list, so that a failing one can be made shorter.

/// What is asked of the server and the helper, one name a kind of call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum CallKind {
    Workers,
    Lease,
    Renew,
    Make,
    Associate,
    Delete,
    Append,
    Fail,
    File,
    List,
    CreateUser,
    Install,
    Attach,
    HostDelete,
    /// The further pages of a list.
    ListMore,
}

pub const OF_SERVER: [CallKind; 8] = [
    CallKind::Workers,
    CallKind::Lease,
    CallKind::Renew,
    CallKind::Make,
    CallKind::Associate,
    CallKind::Delete,
    CallKind::Append,
    CallKind::Fail,
];
pub const OF_HELPER: [CallKind; 6] = [
    CallKind::List,
    CallKind::CreateUser,
    CallKind::Install,
    CallKind::Attach,
    CallKind::HostDelete,
    CallKind::ListMore,
];

impl CallKind {
    pub fn is_of_server(self) -> bool {
        self < CallKind::List
    }

    /// Asked once a poll, whatever happens.
    pub fn is_poll(self) -> bool {
        matches!(self, CallKind::Workers | CallKind::List | CallKind::Lease)
    }
}

/// How much of an operation of the helper was done when it was cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    Nothing,
    Half,
    All,
}

/// What becomes of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallFault {
    Fine,
    /// The request is lost, and the caller is told at once.
    LostRequest,
    /// It is carried out, and the answer is lost.
    LostAnswer,
    /// The caller has given up long before it is carried out, so many milliseconds after it was sent.
    Late(u64),
    /// It is carried out, and again after so many milliseconds. The caller gets one of the two answers.
    Twice {
        gap: u64,
        second: bool,
    },
    /// An error instead of an answer. `json`: in the server's own form. `done`: after it was carried out.
    Status {
        code: u16,
        json: bool,
        done: bool,
    },
    /// A page instead of an answer, with status 200.
    Html,
    /// Half of the answer, with status 200.
    Truncated,
    /// A whole answer about others.
    OtherIds,
    Slow(u64),
    /// The helper closes the connection in the middle.
    Closed(Extent),
    Busy,
    /// The helper could not do it.
    CouldNot,
    /// What the helper answers does not decode.
    Garbage,
}

/// How the server or the helper is for a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Up,
    Down,
    /// Nothing is ever answered.
    Hung,
    Slow(u64),
    /// The server: 502 and a page from a proxy. The helper: Busy.
    Errors,
    /// The server: its own 500, in JSON.
    Broken,
}

/// What the next agent does instead of its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AgentFault {
    NeverOnline,
    /// It comes online so many milliseconds late.
    LateOnline(u64),
    DiesEarly,
    /// Killed before it was online, by nobody who would say so.
    KilledEarly,
    DiesLate,
    /// Killed in the instant in which it has come online.
    KilledAtOnce,
    KilledLate,
    TimesOut,
    /// Its job never ends.
    JobHangs,
}

/// Where a supervisor dies with respect to a call of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    Sent,
    /// The helper has done half of it; and the database is lost with the supervisor.
    HalfDone,
    CarriedOut,
    Answered,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    Add,
    Remove(u64),
    Rename(u64),
    Conflicts(u64),
    Target(u64),
}

/// One thing that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Item {
    Submit {
        target: u64,
        takes: u64,
    },
    Call(CallKind, CallFault),
    /// The same for every call of this kind, for so long.
    Every(CallKind, CallFault, u64),
    Server(Mode, u64),
    Helper(Mode, u64),
    /// The server leases nothing: held, or this factory is disabled.
    NoLeases(u64),
    /// The server makes every worker held.
    HoldNew(u64),
    /// The server is one that does not know how to fail a worker.
    OldServer(u64),
    ExpireLeases,
    /// The server's database is again what it was so many minutes ago.
    Rollback(u64),
    Agent(AgentFault),
    /// The kernel's OOM killer, or root, ends the nth running agent.
    Kill(u64),
    Reboot(u64),
    HelperRestart(Extent),
    Crash(u64),
    CrashAfterSaves(u64, u64),
    CrashAt(CallKind, Point, u64),
    Stop(u64),
    LoseDatabase(u64),
    /// The supervisor's disk is full, or read-only, for so long: no write is carried out.
    DiskFull(u64),
    /// The same, after so many more writes.
    DiskFullAfter(u64, u64),
    /// There is little room left, for so long: what is written is written.
    DiskLow(u64),
    /// A second host is started with the same token.
    SecondStarts,
    SecondCrashes(u64),
    /// The second host does not reach the server for so long.
    SecondCut(u64),
    /// The second host is no more, and nobody has deleted its workers.
    SecondIsLost,
    /// The host's clock is set forward or back by so many seconds.
    Clock(i64),
    /// The hosts sleep for so long, and the server does not.
    Suspend(u64),
    /// The record of the nth worker on the host is damaged.
    Damage(u64),
    /// The nth worker on the host cannot be deleted for so long.
    Undeletable(u64, u64),
    Hold(u64),
    Release(u64),
    Recycle(u64),
    Cancel(u64),
    Drain(u64),
    DrainSlot(u64, u64),
    /// The file is changed; the supervisor reads it again after so many milliseconds.
    Config(Change, u64),
    /// The file makes no sense for so long.
    InvalidConfig(u64),
}

impl Item {
    /// For the report: each of these must have happened at least once.
    pub fn name(&self) -> String {
        let text = format!("{self:?}");
        let word = |text: &str| {
            text.split(['(', '{', ' ', ',', ')'])
                .next()
                .unwrap_or("")
                .to_owned()
        };
        match self {
            Item::Call(kind, fault) => {
                let side = if kind.is_of_server() { "server" } else { "helper" };
                format!("{side} call: {}", word(&format!("{fault:?}")))
            }
            Item::Every(..) => "every call of a kind".to_owned(),
            Item::Server(mode, _) => format!("server: {}", word(&format!("{mode:?}"))),
            Item::Helper(mode, _) => format!("helper: {}", word(&format!("{mode:?}"))),
            Item::Agent(fault) => format!("agent: {}", word(&format!("{fault:?}"))),
            Item::Config(change, _) => format!("configuration: {}", word(&format!("{change:?}"))),
            Item::CrashAt(_, point, _) => format!("crash at a call: {point:?}"),
            _ => word(&text),
        }
    }
}

#[derive(Clone, Debug)]
pub struct Step {
    pub at: u64,
    pub item: Item,
}

/// A whole simulation's script.
#[derive(Clone, Debug)]
pub struct Script {
    pub seed: u64,
    pub slots: u64,
    pub poll_seconds: u64,
    pub steps: Vec<Step>,
    /// From here on nothing bad happens any more.
    pub faults_end_at: u64,
    /// Everything must come to its end then; otherwise the simulation just stops.
    pub settles: bool,
}
