//! kill -9 at every system call: of the helper, in each of its processes and of all at once, and of the
//! supervisor. After each, what was begun is repeated, or deleted at once; then the host is as it was.
//! Needs root.
//!
//! Each test kills at a part of the points that it finds: at the first of each system call, and at every so
//! many of all, beginning elsewhere each time. `POINTS=all` kills at every one, each with both ends.

mod helper;
mod monitor_requests;
mod restartable_helper;
mod supervisor;
