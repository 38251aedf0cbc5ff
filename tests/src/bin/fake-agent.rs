//! The fake agent; see `testbed::fake_agent`.

fn main() {
    if let Err(e) = testbed::fake_agent::main() {
        eprintln!("ERROR: {e:#}");
        std::process::exit(1);
    }
}
