//! What comes with the package and follows from the command line: completions and man pages.

use std::io;

use clap::{Command, CommandFactory, ValueEnum};
use clap_complete::Shell;
use clap_mangen::Man;

use super::{Arguments, print_line};

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Generated {
    Bash,
    Zsh,
    Fish,
    /// The man page user-factory(1), with a section for each command.
    Man,
}

pub fn generate(what: Generated) -> io::Result<()> {
    let mut command = Arguments::command();
    let mut out = Vec::new();
    let shell = match what {
        Generated::Bash => Shell::Bash,
        Generated::Zsh => Shell::Zsh,
        Generated::Fish => Shell::Fish,
        Generated::Man => return man(command, &mut out).map(|()| print_line(&String::from_utf8_lossy(&out))),
    };
    clap_complete::generate(shell, &mut command, "user-factory", &mut out);
    print_line(&String::from_utf8_lossy(&out));
    Ok(())
}

fn man(mut command: Command, out: &mut impl io::Write) -> io::Result<()> {
    command.build();
    let page = Man::new(command.clone());
    page.render_title(out)?;
    page.render_name_section(out)?;
    page.render_synopsis_section(out)?;
    page.render_description_section(out)?;
    for sub in command
        .get_subcommands()
        .filter(|sub| !sub.is_hide_set() && sub.get_name() != "help")
    {
        writeln!(out, ".SH \"{}\"", sub.get_name().to_uppercase())?;
        let page = Man::new(sub.clone());
        for render in [
            Man::render_description_section,
            Man::render_synopsis_section,
            Man::render_options_section,
        ] {
            let mut section = Vec::new();
            render(&page, &mut section)?;
            // A section of a page of its own becomes a part of this one's.
            out.write_all(
                String::from_utf8_lossy(&section)
                    .replace(".SH ", ".SS ")
                    .as_bytes(),
            )?;
        }
    }
    page.render_extra_section(out)
}
