//! What needs a host: the real binaries, as root, with users, namespaces, cgroups and mounts of their own. Needs root.
//!
//! It is one program, because most of these tests wait for something (a poll of the server, an agent, a time-out), and
//! wait together here.

mod attacks;
mod crashes;
mod end_to_end;
mod faults;
mod hardware;
mod model;
mod operator;
mod socket;
