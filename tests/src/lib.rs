//! The test bed: what the factory is tried against.
//!
//! [`fake_server`] is a fake buildomat server, over real HTTP and with a clock that tests can
//! move; [`fake_agent`] is a fake agent with the real one's command line, files and behaviour. All `unsafe` of
//! the library is in `tracer::sys`.
#![warn(missing_docs)]

pub mod bench;
pub mod certificates;
pub mod fake_agent;
pub mod fake_server;
pub mod fake_usb;
pub mod faulty_proxy;
pub mod forward_proxy;
pub mod harness;
pub mod helper_model;
pub mod host_snapshot;
pub mod pages;
pub mod sample;
pub mod service_manager;
pub mod small_disk;
pub mod sources;
pub mod test_factory;
pub mod test_helper;
pub mod tracer;
pub mod worker_snapshot;
