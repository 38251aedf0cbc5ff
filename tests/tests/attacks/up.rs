//! Group C: getting up: privileges, other processes, the kernel's files, mounts. What the hostile job attempts is in its module of the same name.
