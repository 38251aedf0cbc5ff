//! Draws `docs/performance.svg` from what `--save` has kept: for each group that was measured, the medians of its
//! ways as bars, and a mark where 95 of 100 are below.
//!
//!     cargo bench -p testbed --bench chart

use std::fmt::Write;
use std::fs;

use testbed::bench::{Report, place};

const NAMES: f64 = 290.0;
const BARS: f64 = 400.0;
const WIDTH: f64 = NAMES + BARS + 110.0;
const ROW: f64 = 20.0;

fn main() {
    let mut body = String::new();
    let mut y = 10.0;
    for name in ["lifecycle", "deletion", "kill", "latency", "job"] {
        let path = place().join(format!("{name}.json"));
        let Ok(text) = fs::read_to_string(&path) else {
            eprintln!("{name} is not drawn: measure it with --save");
            continue;
        };
        let report: Report =
            serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        for group in &report.groups {
            y += 26.0;
            text_at(&mut body, 10.0, y, "title", &group.title);
            y += 6.0;
            let most = group
                .ways
                .iter()
                .map(|way| way.quantile(0.95))
                .fold(0.0, f64::max);
            let first = group.ways[0].median();
            for (at, way) in group.ways.iter().enumerate() {
                y += ROW;
                let (median, p95) = (way.median() / most * BARS, way.quantile(0.95) / most * BARS);
                // What explains a long one does not fit.
                let short = way.name.split(": ").next().filter(|_| way.name.len() > 38);
                text_at(&mut body, 20.0, y, "name", short.unwrap_or(&way.name));
                let class = if at == 0 { "ours" } else { "other" };
                let top = y - 12.0;
                writeln!(
                    body,
                    "<rect class='{class}' x='{NAMES}' y='{top:.0}' width='{median:.1}' height='14' rx='2'/>"
                )
                .expect("a string takes it");
                let x = NAMES + p95;
                let bottom = y + 2.0;
                writeln!(body, "<path class='mark' d='M{x:.1} {top:.0}V{bottom:.0}'/>")
                    .expect("a string takes it");
                let label = format!("{} · {:.2}", milliseconds(way.median()), way.median() / first);
                text_at(&mut body, x + 6.0, y, "value", &label);
            }
        }
    }
    let height = y + 40.0;
    text_at(
        &mut body,
        10.0,
        height - 12.0,
        "name",
        "bar: median, with its ratio to the first of the group; mark: 95 of 100 are below",
    );
    let svg = format!(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height:.0}' font-family='sans-serif' font-size='12'>\n\
         <style>.title{{font-weight:bold;font-size:13px}}.ours{{fill:#1d7a8c}}.other{{fill:#b9c3c7}}\
         .mark{{stroke:#555;stroke-width:1.5}}text{{fill:#222}}</style>\n\
         <rect width='100%' height='100%' fill='#fff'/>\n{body}</svg>\n"
    );
    let path = place().with_extension("svg");
    fs::write(&path, svg).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    println!("{}", path.display());
}

fn text_at(body: &mut String, x: f64, y: f64, class: &str, text: &str) {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    writeln!(body, "<text class='{class}' x='{x:.1}' y='{y:.1}'>{text}</text>").expect("a string takes it");
}

fn milliseconds(microseconds: f64) -> String {
    match microseconds {
        us if us < 10_000.0 => format!("{:.2} ms", us / 1e3),
        us => format!("{:.0} ms", us / 1e3),
    }
}
