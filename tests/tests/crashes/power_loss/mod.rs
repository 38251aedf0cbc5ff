//! Power loss: what the helper and the supervisor write is recorded from real operations, and put on a disk
//! again as if the power had gone at each point. Whatever the disk then has, a new helper lists it and deletes
//! it to the end, its slot is free, and a new supervisor finds its workers as they were at some moment. Needs
//! root.
//!
//! The disk keeps what was done in its order; or, at worst, what was synced, and of the rest what it likes.

mod damage;
mod helper;
mod supervisor;
