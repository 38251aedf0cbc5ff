//! How things look on a terminal. Pure: values in, text with colours out; the writer removes the colours
//! where they do not belong.

use anstyle::{AnsiColor, Style};
use jiff::Timestamp;
use protocol::{SlotName, one_line};
use supervisor::control::api::{
    DestinationUse, Details, Drain, EgressReport, PeerStatus, Slot, SlotState, Status,
};
use supervisor::residue::Report;
use supervisor::selftest::{Outcome, SlotReport};
use supervisor::usb::list::ListedDevice;

const BAD: Style = AnsiColor::Red.on_default().bold();
const GOOD: Style = AnsiColor::Green.on_default();
const BUSY: Style = AnsiColor::Blue.on_default();
const DIMMED: Style = Style::new().dimmed();
const NOTICE: Style = AnsiColor::Yellow.on_default();
const HEAD: Style = Style::new().bold();

fn styled(style: Style, text: &str) -> String {
    format!("{style}{text}{style:#}")
}

/// How long ago, in the largest two units that an operator needs.
pub fn ago(then: Timestamp, now: Timestamp) -> String {
    let s = now.duration_since(then).as_secs().max(0);
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min", s / 60),
        3600..86_400 => format!("{} h {} min", s / 3600, s % 3600 / 60),
        _ => format!("{} d {} h", s / 86_400, s % 86_400 / 3600),
    }
}

/// A number of bytes, rounded.
pub fn size(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{bytes} B")
    } else {
        format!("{value:.1} {}", units[unit])
    }
}

/// A cell of a table: a text without line ends, and how it looks.
type Cell = (Style, String);

fn plain(text: impl ToString) -> Cell {
    (Style::new(), one_line(&text.to_string()))
}

fn or_nothing(text: Option<impl ToString>) -> Cell {
    plain(text.map(|text| text.to_string()).unwrap_or_default())
}

/// Columns as wide as their widest cell, two spaces apart.
fn table<const N: usize>(head: [&str; N], rows: impl Iterator<Item = [Cell; N]>) -> String {
    let rows: Vec<[Cell; N]> = std::iter::once(head.map(|name| (HEAD, name.to_owned())))
        .chain(rows)
        .collect();
    let width = |column: usize| {
        rows.iter()
            .map(|row| row[column].1.chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: [usize; N] = std::array::from_fn(width);
    let line = |row: &[Cell; N]| {
        let last = row
            .iter()
            .rposition(|(_, text)| !text.is_empty())
            .map_or(0, |at| at + 1);
        let cells = row[..last]
            .iter()
            .zip(widths)
            .enumerate()
            .map(|(column, ((style, text), width))| {
                let padding = if column + 1 == last {
                    0
                } else {
                    width + 2 - text.chars().count()
                };
                styled(*style, text) + &" ".repeat(padding)
            });
        cells.collect::<String>() + "\n"
    };
    rows.iter().map(line).collect()
}

fn state(state: SlotState) -> Cell {
    let style = match state {
        SlotState::Free => GOOD,
        SlotState::Busy => BUSY,
        SlotState::Broken | SlotState::Held | SlotState::Absent => BAD,
        SlotState::CoolingDown | SlotState::Closed => NOTICE,
        SlotState::Blocked | SlotState::Draining | SlotState::Removed => DIMMED,
    };
    (style, state.name().to_owned())
}

fn peer(name: &str, peer: &PeerStatus, now: Timestamp) -> String {
    let since = ago(peer.since, now);
    let how = match peer.reachable {
        Some(true) | None if peer.unanswered_since.is_some() => {
            let since = peer.unanswered_since.unwrap_or(peer.since);
            styled(BAD, &format!("has not answered for {}", ago(since, now)))
        }
        Some(true) => styled(GOOD, &format!("reachable for {since}")),
        Some(false) => {
            let why = peer.trouble.as_deref().unwrap_or("no reason is known");
            format!("{}: {why}", styled(BAD, &format!("unreachable for {since}")))
        }
        None => "not asked yet".into(),
    };
    format!("{name:8} {} {how}\n", peer.address)
}

pub fn status(s: &Status) -> String {
    let mut text = peer("server", &s.server, s.now);
    text += &peer("helper", &s.helper, s.now);
    if let Some(page) = s.status_page.as_ref().filter(|page| page.reachable != Some(true)) {
        let why = page.trouble.as_deref().unwrap_or("no reason is known");
        let closed = styled(BAD, &format!("not open for {}", ago(page.since, s.now)));
        text += &format!("{:8} {} {closed}: {why}\n", "page", page.address);
    }
    text += &format!(
        "{:8} {} (protocol {}), running for {}\n",
        "version",
        s.version,
        s.protocol,
        ago(s.started, s.now)
    );
    if let Some(token) = &s.configuration.token {
        text += &format!("{:8} of {token}\n", "token");
    }
    let taken = match &s.not_taken {
        _ if s.draining => {
            let all = s.drains.iter().find(|drain| drain.slot.is_none());
            let details = all.map(Drain::details).unwrap_or_default();
            styled(
                NOTICE,
                &format!("draining{details}: no new ones are taken; `user-factory resume` takes them again"),
            )
        }
        Some(why) => styled(BAD, &format!("not taken: {why}")),
        None => "taken".into(),
    };
    text += &format!("{:8} {taken}\n", "jobs");
    if let Some(last) = &s.selftest {
        let when = ago(last.at, s.now);
        let found = match &last.failure {
            None => styled(GOOD, &format!("passed {when} ago")),
            Some(why) => format!("{}: {why}", styled(BAD, &format!("failed {when} ago"))),
        };
        text += &format!("{:8} {found}\n", "selftest");
    }
    if let Some(why) = &s.configuration.refused {
        text += &format!(
            "{:8} {} {why}\n",
            "config",
            styled(BAD, "changed, and not in use:")
        );
    }
    if let Some(why) = &s.storage {
        text += &format!("{:8} {}\n", "disk", styled(BAD, why));
    }
    for foreign in &s.foreign {
        text += &format!("{:8} {}\n", "foreign", styled(BAD, &foreign.text));
    }
    let rows = s.slots.iter().map(|slot| {
        let since = slot.since.map(|since| ago(since, s.now));
        [
            plain(&slot.name),
            state(slot.state),
            or_nothing(since),
            or_nothing(slot.job.as_ref()),
            or_nothing(slot.because.as_ref()),
        ]
    });
    text += "\n";
    text += &table(["SLOT", "STATE", "SINCE", "JOB", "WHY"], rows);
    let waiting: Vec<_> = s.workers.iter().filter(|worker| worker.hold.is_some()).collect();
    if !waiting.is_empty() {
        text += &format!("\n{}\n", styled(BAD, "waiting for an operator"));
        for worker in waiting {
            let held = worker.hold.map(|since| ago(since, s.now)).unwrap_or_default();
            let why = worker.failure.as_deref().unwrap_or("held on the server");
            text += &format!("{} on {} for {held}: {why}\n", worker.id, worker.slot);
        }
    }
    if !s.troubles.is_empty() {
        text += &format!("\n{}\n", styled(HEAD, "last problems"));
        for problem in s.troubles.iter().rev().take(5).rev() {
            let slot = problem
                .slot
                .as_ref()
                .map(|slot| format!("{slot}: "))
                .unwrap_or_default();
            text += &format!("{:>12} ago  {slot}{}\n", ago(problem.at, s.now), problem.text);
        }
    }
    text
}

pub fn workers(s: &Status) -> String {
    let rows = s.workers.iter().map(|w| {
        let style = if w.hold.is_some() { BAD } else { Style::new() };
        [
            plain(w.id),
            plain(&w.slot),
            (style, w.phase.clone()),
            plain(ago(w.since, s.now)),
            or_nothing(w.job.as_ref()),
            plain(&w.user),
        ]
    });
    table(["WORKER", "SLOT", "PHASE", "SINCE", "JOB", "USER"], rows)
}

/// A table for each slot, and a line that says whether all holds.
pub fn selftest(slots: &[SlotReport], holds: bool) -> String {
    let mut text = String::new();
    for slot in slots {
        if let Some(why) = &slot.busy {
            text += &format!("slot {}: nothing was tried: {why}\n\n", slot.slot);
            continue;
        }
        let rows = slot.attempts.iter().map(|attempt| {
            let style = match attempt.outcome {
                Outcome::Ok => GOOD,
                Outcome::Failed => BAD,
                Outcome::NotEnforced | Outcome::NotTried => NOTICE,
            };
            [
                (style, attempt.outcome.name().to_owned()),
                plain(&attempt.guarantee),
                plain(&attempt.tried),
                plain(&attempt.seen),
            ]
        });
        text += &format!(
            "slot {}\n{}\n",
            slot.slot,
            table(["RESULT", "GUARANTEE", "TRIED", "SEEN"], rows)
        );
    }
    let count = |outcome| {
        let attempts = slots.iter().flat_map(|slot| &slot.attempts);
        attempts.filter(|attempt| attempt.outcome == outcome).count()
    };
    let counted = [
        Outcome::Ok,
        Outcome::Failed,
        Outcome::NotEnforced,
        Outcome::NotTried,
    ]
    .map(|outcome| format!("{} {}", count(outcome), outcome.name()))
    .join(", ");
    let (style, word) = match holds {
        true => (GOOD, "all checks passed"),
        false if slots.iter().all(|slot| slot.busy.is_some()) => (BAD, "nothing was tried: no slot is free"),
        false => (BAD, "some checks failed"),
    };
    text + &styled(style, &format!("{word}: {counted}")) + "\n"
}

/// What is left, and in one line what was looked at.
pub fn residue(report: &Report, files_were_searched: bool) -> String {
    let (first, last) = report.uid_range;
    let files = match files_were_searched {
        true => format!("; {} files on local file systems", report.files_seen),
        false => "; files were not searched".to_owned(),
    };
    let mut text = format!(
        "looked for what is of uids {first} to {last} and of none of the {} workers{files}\n",
        report.workers.len()
    );
    for (place, why) in &report.not_searched {
        text += &format!("not searched: {}: {why}\n", one_line(place));
    }
    if report.is_clean() {
        return text + &styled(GOOD, "nothing is left") + "\n";
    }
    let rows = report
        .found
        .iter()
        .map(|left| [(BAD, left.kind.name().to_owned()), plain(&left.what)]);
    text + &table(["LEFT", "WHAT"], rows)
}

pub fn details(d: &Details, now: Timestamp) -> String {
    let w = &d.worker;
    let mut text = String::new();
    let mut line = |name: &str, value: &str| text += &format!("{name:10} {value}\n");
    line("worker", &w.id.to_string());
    line("slot", w.slot.as_str());
    line("phase", &format!("{} for {}", w.phase, ago(w.since, now)));
    if let Some(since) = w.hold {
        line("held", &styled(BAD, &format!("for {}", ago(since, now))));
    }
    if let Some(job) = &w.job {
        line("job", &job.to_string());
    }
    let uid = w.uid.map(|uid| format!(" (uid {uid})")).unwrap_or_default();
    line("user", &format!("{}{uid}", w.user));
    if let Some(why) = &w.failure {
        line("failure", &styled(BAD, why));
    }
    if let Some(trouble) = &w.trouble {
        line("trouble", trouble);
    }
    line("memory", &size(d.memory));
    let uncounted = || "not counted: the state directory's file system has no user quotas".into();
    line("disk", &w.disk.map_or_else(uncounted, size));
    line("next", &w.next);
    text += &format!("\n{}\n", styled(HEAD, "phases"));
    for step in &d.history {
        let note = step
            .note
            .as_deref()
            .map(|note| format!("  {note}"))
            .unwrap_or_default();
        text += &format!("{}  {}{note}\n", step.at, step.phase);
    }
    if !d.processes.is_empty() {
        text += "\n";
        let rows = d.processes.iter().map(|p| {
            [
                plain(p.pid),
                plain(p.state),
                plain(size(p.memory)),
                plain(&p.name),
            ]
        });
        text += &table(["PID", "STATE", "MEMORY", "NAME"], rows);
    }
    let egress = d.egress.iter().flat_map(|report| {
        let used = report.used.iter().map(|each| (Style::new(), "used", each));
        used.chain(report.refused.iter().map(|each| (BAD, "refused", each)))
    });
    let rows: Vec<_> = egress
        .map(|(style, how, each)| {
            [
                plain(&each.destination),
                plain(each.connections),
                plain(ago(each.last, now)),
                (style, how.to_owned()),
            ]
        })
        .collect();
    if !rows.is_empty() {
        text += "\n";
        text += &table(["DESTINATION", "CONNECTIONS", "LAST", "EGRESS"], rows.into_iter());
    }
    if !d.console.is_empty() {
        text += &format!("\n{}\n", styled(HEAD, "last lines of the console"));
        for line in &d.console {
            text += &format!("{line}\n");
        }
    }
    text
}

/// What the jobs of a slot have connected to, to be pasted into the configuration; what was refused in comments.
pub fn egress(slot: &SlotName, report: &EgressReport) -> String {
    let item = |each: &DestinationUse| format!("    {:?},", each.destination);
    let uses = |each: &DestinationUse| {
        let plural = if each.connections == 1 { "" } else { "s" };
        let last = each.last.strftime("%Y-%m-%d");
        format!("{} connection{plural}, last on {last}", each.connections)
    };
    let width = report.used.iter().map(|each| item(each).len()).max().unwrap_or(0);
    let mut text = format!("[slots.{slot}]\nnetwork.allow = [\n");
    for each in &report.used {
        text += &format!("{:width$} # {}\n", item(each), uses(each));
    }
    for each in &report.refused {
        text += &format!("#{} # refused: {}\n", item(each), uses(each));
    }
    text + "]\n"
}

/// A table of what is plugged in, then the lines to paste for what belongs to no slot.
pub fn devices(devices: &[ListedDevice]) -> String {
    if devices.is_empty() {
        return "no USB device is plugged in\n".to_owned();
    }
    let rows = devices.iter().map(|device| {
        let serial = match device.is_read {
            true => or_nothing(device.serial.as_ref()),
            false => (NOTICE, "not known".to_owned()),
        };
        let entries = device.entries.iter();
        let entries: Vec<String> = entries
            .map(|entry| format!("{} (usb.{})", entry.slot, entry.usb))
            .collect();
        [
            plain(device.id_path.as_ref().unwrap_or(&device.port)),
            plain(format!("{}:{}", device.vendor, device.product)),
            serial,
            or_nothing(device.description.as_ref()),
            plain(entries.join(", ")),
            plain(device.nodes.join(" ")),
        ]
    });
    let mut text = table(["PORT", "ID", "SERIAL", "PRODUCT", "SLOTS", "NODES"], rows);
    for device in devices.iter().filter(|device| !device.is_read) {
        text += &format!(
            "\nThe kernel does not tell the serial number of what is at {}: a process keeps the device busy. Find it with: fuser -v {}\n",
            device.port,
            device.nodes.join(" ")
        );
    }
    let free: Vec<&ListedDevice> = devices
        .iter()
        .filter(|device| device.entries.is_empty())
        .collect();
    if !free.is_empty() {
        text += &format!(
            "\n{}\n",
            styled(
                HEAD,
                "lines for the configuration of a slot, with a name in place of NAME"
            )
        );
    }
    for device in free {
        let what = device.description.as_deref().unwrap_or_default();
        let what = format!("{}:{} {what}", device.vendor, device.product);
        text += &format!("{}  # {}\n", one_line(&device.line), one_line(what.trim_end()));
    }
    text
}

/// One slot that is not empty yet, and why: for `drain --wait`.
pub fn waiting_for(slot: &Slot, status: &Status) -> String {
    let worker = status
        .workers
        .iter()
        .find(|worker| Some(worker.id) == slot.worker);
    let why = match worker {
        Some(worker) if worker.hold.is_some() => format!(", {}: {}", slot.state.name(), worker.next),
        _ => String::new(),
    };
    match (&slot.job, slot.worker) {
        (Some(job), _) => format!("{} (job {job}{why})", slot.name),
        (None, Some(worker)) => format!("{} (worker {worker}{why})", slot.name),
        (None, None) => slot.name.to_string(),
    }
}

/// Makes a stream of a job's bytes harmless for a terminal: control characters but newline and tab become
/// visible, whatever pieces they come in.
#[derive(Debug, Default)]
pub struct EscapingDecoder {
    /// The beginning of a character whose rest has not come.
    rest: Vec<u8>,
}

impl EscapingDecoder {
    pub fn next(&mut self, bytes: &[u8]) -> String {
        self.rest.extend_from_slice(bytes);
        let whole = match std::str::from_utf8(&self.rest) {
            Ok(_) => self.rest.len(),
            Err(error) if error.error_len().is_none() => error.valid_up_to(),
            Err(_) => self.rest.len(),
        };
        let text = String::from_utf8_lossy(&self.rest[..whole]).into_owned();
        self.rest.drain(..whole);
        let mut clean = String::with_capacity(text.len());
        for c in text.chars() {
            match c {
                '\n' | '\t' => clean.push(c),
                '\r' => {}
                c if c.is_control() => clean.extend(c.escape_default()),
                c => clean.push(c),
            }
        }
        clean
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use supervisor::residue;
    use supervisor::usb::list::ListedEntry;

    use super::*;

    #[test]
    fn a_name_with_a_terminals_commands_in_it_is_shown_and_not_obeyed() {
        let left = residue::Residue {
            kind: residue::ResidueKind::File,
            what: "/tmp/a\u{1b}[2Jb\nnothing is left".into(),
        };
        let report = Report {
            uid_range: (1, 2),
            workers: BTreeMap::new(),
            found: BTreeSet::from([left]),
            files_seen: 3,
            not_searched: BTreeMap::new(),
        };
        let text = anstream::adapter::strip_str(&residue(&report, true)).to_string();
        let last = text.lines().last().unwrap();
        assert_eq!(last, "file  /tmp/a\\u{1b}[2Jb\\nnothing is left");
    }

    #[test]
    fn a_device_with_a_terminals_commands_in_its_texts_is_shown_and_not_obeyed() {
        let device = |port: &str, entries| ListedDevice {
            port: port.into(),
            id_path: None,
            vendor: "0403".into(),
            product: "6001".into(),
            manufacturer: None,
            description: Some("a\u{1b}[2J\nusb.x = {}".into()),
            serial: Some("b\u{9b}2J\r".into()),
            is_read: port != "1-3",
            nodes: vec!["/dev/bus/usb/001/002".into()],
            entries,
            line: format!("usb.NAME = {{ port = \"{port}\" }}"),
        };
        let entry = ListedEntry {
            slot: "bench".parse().unwrap(),
            usb: "probe".into(),
        };
        let text = devices(&[
            device("1-1", vec![]),
            device("1-2", vec![entry.clone()]),
            device("1-3", vec![entry]),
        ]);
        let text = anstream::adapter::strip_str(&text).to_string();
        assert_eq!(
            text.lines().collect::<Vec<_>>(),
            [
                "PORT  ID         SERIAL       PRODUCT                 SLOTS              NODES",
                "1-1   0403:6001  b\\u{9b}2J\\r  a\\u{1b}[2J\\nusb.x = {}                     /dev/bus/usb/001/002",
                "1-2   0403:6001  b\\u{9b}2J\\r  a\\u{1b}[2J\\nusb.x = {}  bench (usb.probe)  /dev/bus/usb/001/002",
                "1-3   0403:6001  not known    a\\u{1b}[2J\\nusb.x = {}  bench (usb.probe)  /dev/bus/usb/001/002",
                "",
                "The kernel does not tell the serial number of what is at 1-3: a process keeps the device busy. Find it with: fuser -v /dev/bus/usb/001/002",
                "",
                "lines for the configuration of a slot, with a name in place of NAME",
                "usb.NAME = { port = \"1-1\" }  # 0403:6001 a\\u{1b}[2J\\nusb.x = {}",
            ]
        );
        assert_eq!(devices(&[]), "no USB device is plugged in\n");
    }

    #[test]
    fn columns_line_up_whatever_their_colours() {
        let rows = [
            [plain("a"), (BAD, "broken".into())],
            [plain("a-long-name"), plain("")],
        ];
        let text = anstream::adapter::strip_str(&table(["SLOT", "STATE"], rows.into_iter())).to_string();
        assert_eq!(text, "SLOT         STATE\na            broken\na-long-name\n");
    }

    #[test]
    fn durations_and_sizes_are_short() {
        let at = |s: i64| Timestamp::from_second(1_800_000_000 + s).unwrap();
        let time_ago = |s| ago(at(0), at(s));
        assert_eq!(
            [
                time_ago(-5),
                time_ago(59),
                time_ago(3599),
                time_ago(7260),
                time_ago(90_000)
            ],
            ["0 s", "59 s", "59 min", "2 h 1 min", "1 d 1 h"]
        );
        assert_eq!(
            [size(0), size(1023), size(1536), size(5 << 40)],
            ["0 B", "1023 B", "1.5 KiB", "5.0 TiB"]
        );
    }

    #[test]
    fn a_jobs_escapes_are_shown_and_characters_that_come_in_pieces_are_whole() {
        let mut visible = EscapingDecoder::default();
        assert_eq!(visible.next(b"a\x1b[2Jb\r\n\tc\xc3"), "a\\u{1b}[2Jb\n\tc");
        assert_eq!(visible.next(b"\xa9\xff"), "\u{e9}\u{fffd}");
    }
}
