//! What an agent printed, as lines for a job's log. The text is a job's own: it may be anything, so every
//! line is bounded and cleaned. Nothing here may interpret it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use protocol::config::MAX_CONSOLE_BYTES;

/// The most lines that go into a job's log.
pub const MAX_LINES: usize = 200;
/// The longest line, in bytes; the rest of it is left out.
pub const MAX_LINE: usize = 4 << 10;

/// The last lines of a console, with the number of the first of them (beginning with 0).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lines {
    pub first: u32,
    pub lines: Vec<String>,
}

/// Read a console: a regular file that its agent may still be writing. The file offset is shared with
/// others, so it is neither used nor moved.
pub fn read(console: &File) -> io::Result<Lines> {
    // The end says why; the helper's notices may follow the last byte that was kept.
    let whole = console.metadata()?.len().min(MAX_CONSOLE_BYTES + 1024);
    let limit = usize::try_from(whole).unwrap_or(1 << 20);
    let mut bytes = vec![0; limit];
    let mut length = 0;
    while length < limit {
        match console.read_at(&mut bytes[length..], length as u64) {
            Ok(0) => break,
            Ok(n) => length += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(split(&bytes[..length]))
}

/// The last lines of `bytes`, clean.
pub fn split(bytes: &[u8]) -> Lines {
    let bytes = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    if bytes.is_empty() {
        return Lines {
            first: 0,
            lines: Vec::new(),
        };
    }
    let raw: Vec<&[u8]> = bytes.split(|b| *b == b'\n').collect();
    let first = raw.len().saturating_sub(MAX_LINES);
    let lines = raw[first..].iter().map(|line| clean(line)).collect();
    Lines {
        first: u32::try_from(first).unwrap_or(u32::MAX),
        lines,
    }
}

fn clean(line: &[u8]) -> String {
    let cut = &line[..line.len().min(MAX_LINE)];
    let mut text: String = String::from_utf8_lossy(cut)
        .chars()
        .filter(|c| !c.is_control() || *c == '\t')
        .collect();
    // A replaced byte becomes three.
    while text.len() > MAX_LINE {
        text.pop();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    #[test]
    fn escapes_and_bad_bytes_are_cleaned_and_tabs_stay() {
        let lines = split(b"a\tb\x1b[31m\r\n\n\xffz").lines;
        assert_eq!(lines, ["a\tb[31m", "", "\u{fffd}z"]);
    }

    #[test]
    fn only_the_last_lines_are_kept_and_numbered() {
        let text: String = (0..500).map(|i| format!("{i}\n")).collect();
        let Lines { first, lines } = split(text.as_bytes());
        assert_eq!(
            (first, lines.len(), lines[0].as_str(), lines[199].as_str()),
            (300, 200, "300", "499")
        );
        assert_eq!(split(b"").lines, Vec::<String>::new());
    }

    #[test]
    fn a_console_is_read_whatever_its_offset() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"one\ntwo").unwrap();
        assert_eq!(read(&file).unwrap().lines, ["one", "two"]);
    }

    #[test]
    fn the_last_line_of_the_largest_console_is_read() {
        let mut file = tempfile::tempfile().unwrap();
        let kept = usize::try_from(MAX_CONSOLE_BYTES).unwrap();
        file.write_all(&vec![b'x'; kept]).unwrap();
        file.write_all(b"\nthe last line\n").unwrap();
        assert_eq!(read(&file).unwrap().lines.last().unwrap(), "the last line");
    }

    proptest! {
        #[test]
        fn every_line_is_bounded_and_harmless(bytes in proptest::collection::vec(any::<u8>(), 0..9000)) {
            let Lines { lines, .. } = split(&bytes);
            prop_assert!(lines.len() <= MAX_LINES);
            for line in lines {
                prop_assert!(line.len() <= MAX_LINE && !line.chars().any(|c| c.is_control() && c != '\t'));
            }
        }
    }
}
