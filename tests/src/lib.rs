//! The test bed: what the factory is tried against.
//!
//! [`server`] is a stand-in for the buildomat server, over real HTTP and with a clock that tests can
//! move; [`agent`] is a reference agent with the real one's command line, files and manners. All `unsafe` of
//! the library is in `tracer::sys`.

pub mod agent;
pub mod bench;
pub mod census;
pub mod disk;
pub mod forward_proxy;
pub mod harness;
pub mod house;
pub mod model;
pub mod proxy;
pub mod remains;
pub mod server;
pub mod service;
pub mod stage;
pub mod tracer;
