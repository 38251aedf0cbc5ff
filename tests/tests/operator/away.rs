//! What a person is told while the helper cannot work.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testbed::house::ONE;
use testbed::tracer::service::{Connections, Kind, Plan, Span, When, listener, watch};

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn the_status_says_that_the_helper_cannot_install_a_filter_and_what_to_do() {
    let house = House::new(ONE).await;
    house.polls(3).await;
    assert_eq!(say(&house, &["status"]).status, 0);
    // The next listener stops where it would install its filter, as one does that the kernel keeps there.
    let daemon = house.helper.pid();
    let plan = Plan {
        kind: Kind::Listener,
        when: When::First(libc::SYS_seccomp),
        all: false,
        hangs: Some(Connections::GoOn),
    };
    let watcher = watch(daemon, Span::OneConnection, Some(plan));
    kill(Pid::from_raw(listener(daemon) as i32), Signal::SIGKILL).unwrap();
    watcher.join().expect("the tracer has no trouble");
    let trouble = see(&house, |status| {
        let helper = &status["helper"];
        let is_away = helper["reachable"] == false;
        helper["trouble"].as_str().filter(|_| is_away).map(str::to_owned)
    });
    let trouble = trouble.await;
    let parts = [
        "the helper says",
        "has accepted no connection for",
        "seccomp",
        "reboot the host",
    ];
    for part in parts {
        assert!(trouble.contains(part), "{part} is not in {trouble}");
    }
    let said = say(&house, &["status"]);
    assert_eq!(said.status, 4, "{}{}", said.out, said.err);
    for part in parts {
        assert!(said.out.contains(part), "{part} is not in {}", said.out);
    }
    let stopped = listener(daemon);
    kill(Pid::from_raw(stopped as i32), Signal::SIGCONT).unwrap();
    see(&house, |status| {
        (status["helper"]["reachable"] == true).then_some(())
    })
    .await;
    assert_eq!(say(&house, &["status"]).status, 0);
    let job = house.submit("echo served");
    house.completed(job).await;
    house.finish().await;
}
