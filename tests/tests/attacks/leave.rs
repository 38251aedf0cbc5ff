//! Group A: a hostile job; what it attempts is in `hostile-job`'s module of the same name.
