//! What a call changes on the disk.
