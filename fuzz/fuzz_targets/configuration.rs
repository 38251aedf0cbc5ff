//! A configuration: whatever is written there, it is one without contradictions, or a list of mistakes that a
//! human can find.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use protocol::config::{Config, Destination, MAX_CONNECTION_NAME, Mistake, Slot, TO_HTTP_PROXY};

fn findable(mistakes: &[Mistake], text: &str) {
    assert!(!mistakes.is_empty());
    let lines = 1 + text.matches('\n').count();
    for mistake in mistakes {
        assert!(
            (1..=lines).contains(&mistake.line),
            "{mistake:?} of {lines} lines"
        );
        assert!(!mistake.message.is_empty(), "{mistake:?}");
        assert!(!mistake.message.contains(char::is_control), "{mistake:?}");
    }
    assert!(mistakes.is_sorted_by_key(|mistake| mistake.line));
}

fn sound(slot: &Slot, lines: usize) {
    assert!((1..=lines).contains(&slot.line));
    for (name, value) in &slot.env {
        assert!(!name.as_str().contains(['=', '\0']) && !value.as_str().contains('\0'));
    }
    let places: Vec<&Path> = slot
        .writable
        .iter()
        .chain(slot.read_only.keys())
        .map(|p| p.as_path())
        .collect();
    for (i, place) in places.iter().enumerate() {
        for own in ["/proc", "/sys", "/dev", "/run", "/home", "/etc", "/tmp"] {
            assert!(!place.starts_with(own), "{}", place.display());
        }
        for other in &places[i + 1..] {
            assert!(!place.starts_with(other) && !other.starts_with(place));
        }
    }
    for source in slot.read_only.values() {
        assert!(source.as_path().is_absolute());
        assert!(source.as_path().iter().all(|part| part != ".." && part != "."));
    }
    for device in &slot.devices {
        let below = device.below_dev();
        assert!(below.is_relative() && below.iter().all(|part| part != ".."));
        assert!(device.matches(below), "{device} does not mean itself");
        assert!(below.ancestors().all(|directory| device.leads_through(directory)));
        if device.is_plain() {
            assert!(!device.matches(Path::new("null")) || below == Path::new("null"));
        }
    }
    let limits = &slot.limits;
    assert!(
        limits
            .memory
            .is_none_or(|bytes| (16 << 20..1 << 63).contains(&bytes))
    );
    assert!(limits.swap.is_none_or(|bytes| bytes < 1 << 63));
    assert!(
        limits
            .disk
            .is_none_or(|bytes| (1 << 20..1 << 63).contains(&bytes))
    );
    assert!(limits.inodes.is_none_or(|files| (100..1 << 63).contains(&files)));
    assert!(
        limits
            .cpus
            .is_none_or(|cpus| (10..=4_096_000).contains(&cpus.thousandths()))
    );
    assert!((1 << 10..=protocol::config::MAX_CONSOLE_BYTES).contains(&limits.console));
}

fuzz_target!(|text: &str| {
    let config = match Config::parse(text) {
        Ok(config) => config,
        Err(mistakes) => return findable(&mistakes, text),
    };
    let lines = 1 + text.matches('\n').count();
    assert!(!config.slots.is_empty());
    for (name, slot) in &config.slots {
        sound(slot, lines);
        assert!(!config.are_conflicting(name, name));
        assert!(
            slot.conflicts_with_slots
                .iter()
                .all(|other| config.slots.contains_key(other))
        );
        for other in config.slots.keys() {
            assert_eq!(
                config.are_conflicting(name, other),
                config.are_conflicting(other, name)
            );
        }
        if let Some(egress) = &slot.egress {
            for (address, name) in egress.listeners(&config.general.baseurl) {
                let to = name.parse::<Destination>();
                assert!(to.is_ok_and(|to| egress.allow.contains(&to)) || name == TO_HTTP_PROXY);
                assert!(name.len() <= MAX_CONNECTION_NAME && address.port() != 0);
            }
            let (host, port) = config.general.baseurl.name_and_port().unwrap();
            assert!(!host.is_empty() && !host.contains(['/', '@']) && port != 0);
        }
    }
    let range = config.factory.uid_range;
    assert!(range.first <= range.last && range.first.get() >= 1 << 20 && range.contains(range.last.get()));
    assert!((1..=60).contains(&config.factory.poll_seconds));
});
