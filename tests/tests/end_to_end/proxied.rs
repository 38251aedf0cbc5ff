//! A host that reaches the server through an HTTP proxy alone: the server's name is one that the host cannot look up.

use testbed::forward_proxy::ForwardProxy;
use testbed::harness::SUPERVISOR_UID;

use super::*;

const SERVER: &str = "http://ci.example.com";

/// A factory with these keys of `[factory]` and slots, whose supervisor has the proxy in its configuration.
async fn behind_a_forward_proxy(keys_and_slots: &str) -> (TestFactory, ForwardProxy) {
    let mut factory = TestFactory::new(ONE).await;
    factory.end_supervisor(Signal::SIGTERM);
    let proxy = ForwardProxy::start(factory.server.address()).await.unwrap();
    let general = format!("{SERVER}\"\nproxy = \"{}", proxy.url());
    let slots = keys_and_slots.replace("TARGET", &factory.target.to_string());
    factory.host.configure(&general, SUPERVISOR_UID, &slots);
    factory.supervisor = factory.host.start_supervisor();
    (factory, proxy)
}

/// Prints the variables of the agent that runs the task, and of the task: those that have to do with the way to the server.
const VARIABLES: &str = "tr '\\0' '\\n' </proc/$PPID/environ | grep -i -e _proxy= -e ^SSL_ | sort | sed 's/^/agent /'\n\
                         env | grep -i -e _proxy= -e ^SSL_ | sort | sed 's/^/task /'";

#[tokio::test(flavor = "multi_thread")]
async fn supervisor_and_agent_reach_the_server_through_the_proxy_of_the_configuration() {
    let (factory, proxy) = behind_a_forward_proxy(
        "agent_env.SSL_CERT_FILE = \"/etc/passwd\"\n[slots.a]\ntarget = \"TARGET\"\nenv.http_proxy = \"http://other:1\"\n",
    )
    .await;
    let job = factory.wait_for_end(factory.submit(VARIABLES)).await;
    assert_eq!(job.state(), "completed", "{:#?}", job.events);
    let url = proxy.url();
    assert_eq!(
        lines(&job, "stdout"),
        [
            "agent SSL_CERT_FILE=/etc/passwd",
            &format!("agent http_proxy={url}"),
            &format!("agent https_proxy={url}"),
            "task http_proxy=http://other:1",
        ]
    );
    let asked = proxy.asked();
    let has = |part: &str| asked.iter().any(|line| line.starts_with(part));
    // The supervisor's client names the URL to the proxy, the agent's has it connect.
    assert!(has(&format!("POST {SERVER}/0/factory/lease ")), "{asked:#?}");
    assert!(has(&format!("GET {SERVER}/file/agent")), "{asked:#?}");
    assert!(has("CONNECT ci.example.com:80 "), "{asked:#?}");
    factory.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_without_a_network_reaches_the_server_through_egress_proxy_and_http_proxy() {
    let (factory, proxy) = behind_a_forward_proxy(
        "agent_env = { SSL_CERT_FILE = \"/etc/passwd\", ALL_PROXY = \"http://other:1\", no_proxy = \"x\" }\n\
         [slots.a]\ntarget = \"TARGET\"\nnetwork = \"none\"\n",
    )
    .await;
    let job = factory.wait_for_end(factory.submit(VARIABLES)).await;
    assert_eq!(job.state(), "completed", "{:#?}", job.events);
    assert_eq!(lines(&job, "stdout"), ["agent SSL_CERT_FILE=/etc/passwd"]);
    let asked = proxy.asked();
    let tunnels = asked
        .iter()
        .filter(|line| *line == "CONNECT ci.example.com:80 HTTP/1.1");
    assert!(tunnels.count() > 0, "{asked:#?}");
    factory.finish().await;
}
