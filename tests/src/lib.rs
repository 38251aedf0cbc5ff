//! The test bed: what the factory is tried against.
//!
//! [`server`] is a fake buildomat server, over real HTTP and with a clock that tests can
//! move; [`agent`] is a fake agent with the real one's command line, files and behaviour. All `unsafe` of
//! the library is in `tracer::sys`.
#![warn(missing_docs)]

pub mod agent;
pub mod bench;
pub mod certificates;
pub mod disk;
pub mod faulty_proxy;
pub mod forward_proxy;
pub mod harness;
pub mod host_snapshot;
pub mod model;
pub mod pages;
pub mod sample;
pub mod server;
pub mod service;
pub mod sources;
pub mod test_factory;
pub mod test_helper;
pub mod tracer;
pub mod worker_snapshot;
