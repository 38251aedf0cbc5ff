//! The program; its story is the library's.

fn main() -> std::process::ExitCode {
    helper::main()
}
