use std::process::ExitCode;

fn main() -> ExitCode {
    helper::main_of_manual()
}
