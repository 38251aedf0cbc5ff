//! Group C: system calls, environment, groups, scheduling, raw sockets. What the hostile job attempts is in its module of the same name.
