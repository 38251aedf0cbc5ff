//! The page that shows the status: one file, without anything from elsewhere. It asks for `/v1/status` itself, every
//! two seconds.

pub const PAGE: &str = include_str!("page.html");
