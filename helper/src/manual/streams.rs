//! Standard streams for a command of the manual program. The caller's may be pipes or files of root's, which the job's user
//! cannot open again by `/dev/stderr`. The command gets a pipe of its user's for each, and a process of root's outside
//! the sandbox copies the bytes.

use std::fs::File;
use std::io::{self, ErrorKind, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, fchown};

use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::WaitPidFlag;
use nix::unistd::Pid;
use protocol::Uid;

use crate::sys;

/// The pipes, until the copying processes have them.
pub struct Streams {
    input: Option<(PipeReader, PipeWriter)>,
    output: Option<(PipeReader, PipeWriter)>,
    errors: Option<(PipeReader, PipeWriter)>,
    /// Standard output and error are one file, as after `2>&1`: they get one pipe, which keeps the order of the lines.
    is_one: bool,
    copying: Vec<(Pid, bool)>,
}

/// A pipe in place of this stream, unless it is a terminal or `/dev/null`: the first is replaced by a terminal of the
/// sandbox's own, and everybody may open the second.
fn pipe(stream: impl AsFd, uid: Uid) -> Result<Option<(PipeReader, PipeWriter)>> {
    let stream = File::from(stream.as_fd().try_clone_to_owned()?);
    if stream.metadata()?.file_type().is_char_device() {
        return Ok(None);
    }
    let (reader, writer) = io::pipe().context("cannot make a pipe")?;
    // Both ends are one inode.
    fchown(&reader, Some(uid.get()), Some(uid.get())).context("cannot give a pipe to the worker's user")?;
    Ok(Some((reader, writer)))
}

fn identity(stream: impl AsFd) -> io::Result<(u64, u64)> {
    let meta = File::from(stream.as_fd().try_clone_to_owned()?).metadata()?;
    Ok((meta.dev(), meta.ino()))
}

/// Copy to the end. The caller's streams may not block (`O_NONBLOCK`, which all who have them open share).
fn copy(mut from: &File, mut to: &File) -> io::Result<()> {
    let mut buffer = [0; 1 << 16];
    loop {
        let read = when_ready(from, PollFlags::POLLIN, || from.read(&mut buffer))?;
        if read == 0 {
            return Ok(());
        }
        let mut rest = &buffer[..read];
        while !rest.is_empty() {
            let written = when_ready(to, PollFlags::POLLOUT, || to.write(rest))?;
            rest = &rest[written..];
        }
    }
}

fn when_ready(
    file: &File,
    events: PollFlags,
    mut call: impl FnMut() -> io::Result<usize>,
) -> io::Result<usize> {
    loop {
        match call() {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                poll(&mut [PollFd::new(file.as_fd(), events)], PollTimeout::NONE)?;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

impl Streams {
    pub fn new(uid: Uid) -> Result<Streams> {
        let is_one = identity(io::stdout())? == identity(io::stderr())?;
        Ok(Streams {
            input: pipe(io::stdin(), uid)?,
            output: pipe(io::stdout(), uid)?,
            errors: if is_one { None } else { pipe(io::stderr(), uid)? },
            is_one,
            copying: Vec::new(),
        })
    }

    /// In the sandbox's first process: have the pipes as standard streams.
    pub fn replace(&self) -> Result<()> {
        if let Some((reader, _)) = &self.input {
            nix::unistd::dup2_stdin(reader)?;
        }
        if let Some((_, writer)) = &self.output {
            nix::unistd::dup2_stdout(writer)?;
            if self.is_one {
                nix::unistd::dup2_stderr(writer)?;
            }
        }
        if let Some((_, writer)) = &self.errors {
            nix::unistd::dup2_stderr(writer)?;
        }
        Ok(())
    }

    /// Outside, once the first process has its ends: start the copying processes.
    pub fn copy(&mut self) -> Result<()> {
        let (input, output, errors) = (self.input.take(), self.output.take(), self.errors.take());
        let mut start = |from: OwnedFd, to: OwnedFd, is_input| -> Result<()> {
            let copying = sys::fork(|| {
                // A killed `run` leaves nobody to end this one.
                if is_input && nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).is_err() {
                    return 1;
                }
                let keep = [from.as_raw_fd(), to.as_raw_fd()];
                let copied = sys::close_all_but(&keep).and_then(|()| copy(&from.into(), &to.into()));
                i32::from(copied.is_err())
            })
            .context("cannot start a process that copies a stream")?;
            self.copying.push((copying, is_input));
            Ok(())
        };
        if let Some((_, writer)) = input {
            start(io::stdin().as_fd().try_clone_to_owned()?, writer.into(), true)?;
        }
        if let Some((reader, _)) = output {
            start(reader.into(), io::stdout().as_fd().try_clone_to_owned()?, false)?;
        }
        if let Some((reader, _)) = errors {
            start(reader.into(), io::stderr().as_fd().try_clone_to_owned()?, false)?;
        }
        Ok(())
    }

    /// The command has ended: wait for the last bytes that it printed. More input is of no use to it.
    pub fn finish(&self) {
        for (copying, is_input) in &self.copying {
            if *is_input {
                let _ = kill(*copying, Signal::SIGKILL);
            }
            let _ = sys::wait(Some(*copying), WaitPidFlag::empty());
        }
    }
}
