//! The fake server as a program: starts one and says how to reach it.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Parser;
use testbed::fake_server::{Server, ServerOptions};

/// A fake buildomat server; forgets everything when it ends.
#[derive(Parser)]
struct Args {
    #[arg(long, default_value = "127.0.0.1:9979")]
    listen: SocketAddr,
    /// The agent that it offers at /file/agent and /file/agent.gz.
    #[arg(long, value_name = "PATH")]
    agent: Option<PathBuf>,
    /// The name of the one target.
    #[arg(long, default_value = "demo")]
    target: String,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let options = ServerOptions {
        listen: args.listen,
        agent: args.agent,
        ..ServerOptions::default()
    };
    let server = Server::start(options).await?;
    println!("url      {}", server.url());
    println!("target   {} {}", server.add_target(&args.target), args.target);
    println!("factory  {}", server.add_factory("demo").1);
    println!("user     {}", server.user_token());
    tokio::signal::ctrl_c().await?;
    server.stop().await;
    Ok(())
}
