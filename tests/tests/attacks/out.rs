//! Group C: getting out and across: sockets, devices, other jobs, secrets. What the hostile job attempts is in its module of the same name.
