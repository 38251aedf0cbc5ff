//! The fake agent; see `testbed::agent`.

fn main() {
    if let Err(e) = testbed::agent::main() {
        eprintln!("ERROR: {e:#}");
        std::process::exit(1);
    }
}
