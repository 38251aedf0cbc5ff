//! The unprivileged part of the user factory.
//!
//! The server has a queue of jobs. [`factory`] asks it for jobs of the targets whose slots [`schedule`] finds free, and
//! makes a [`worker`] for each. A worker's next action follows from its saved phase alone; [`executor`] carries it out
//! with the buildomat server ([`buildomat`]), the root helper ([`helper_client`]) and the agent's program
//! ([`agent_cache`]). [`store`] saves the workers. [`reconcile`] compares database, server and host: what none of them
//! accounts for is adopted or deleted ([`identity`] tells this host's workers from another's). [`free_resources`] keeps
//! jobs from a host that has no room for them, and [`usb`] from slots whose devices are absent; [`memory_stall`] finds those that stall at their memory limit.
//! [`driver`] is the loop that does the I/O for the pure core: [`factory`], [`worker`], [`schedule`], [`reconcile`] and
//! [`backoff`]. [`control`] is the operator's API. Independent of all that, [`egress_proxy`] forwards the connections
//! of jobs without the host's network.
//!
//! Nothing in this crate runs as root, and the helper trusts nothing in it.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod agent_cache;
pub mod backoff;
pub mod buildomat;
mod call_error;
pub mod config_check;
mod console;
pub mod control;
pub mod descriptors;
pub mod driver;
pub mod egress_proxy;
pub mod egress_records;
pub mod executor;
pub mod factory;
pub mod free_resources;
pub mod helper_client;
pub mod identity;
pub mod job_log;
mod limiter;
pub mod log;
pub mod memory_stall;
pub mod notify;
mod pending_calls;
pub mod preflight;
mod rate_limited_log;
pub mod reconcile;
pub mod residue;
pub mod schedule;
pub mod selftest;
pub mod settings;
pub mod store;
pub mod token;
pub mod usb;
pub mod worker;
