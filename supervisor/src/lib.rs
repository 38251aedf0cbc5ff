//! The unprivileged half of the user factory.
//!
//! The story of a job: the server has a queue; [`factory`] asks it for jobs of the targets whose slots
//! [`schedule`] finds free, and makes a [`worker`] for each. What the worker needs next follows from its
//! saved phase alone; [`act`] carries it out, with the buildomat server ([`server`]), the root helper
//! ([`helper`]) and the agent's program ([`agent`]). [`store`] remembers the workers, [`reconcile`] finds
//! an owner or an end for whatever does not fit ([`identity`] tells this host's workers from another's), and
//! [`shell`] is the loop that ties the pure core ([`factory`], [`worker`], [`schedule`], [`reconcile`], [`backoff`])
//! to the world. The operator looks in, and has a say, through [`control`]. Beside all that, and without a word to it, [`gate`] carries the bytes of jobs
//! that can reach nobody but the server.
//!
//! Nothing in this crate runs as root, and nothing in it needs to be trusted by the helper.
#![forbid(unsafe_code)]

pub mod act;
pub mod agent;
pub mod backoff;
pub mod config_check;
pub mod console;
pub mod control;
pub mod descriptors;
pub mod factory;
pub mod gate;
pub mod helper;
pub mod host;
pub mod identity;
pub mod limiter;
pub mod log;
pub mod notify;
pub mod pending_calls;
pub mod rate_limited_log;
pub mod reconcile;
pub mod schedule;
pub mod server;
pub mod settings;
pub mod shell;
pub mod store;
pub mod token;
pub mod view;
pub mod worker;
