//! What is acknowledged is stored, and what is not is sent again: whatever is killed.

#![allow(clippy::unwrap_used, reason = "a test that can't go on is to fail")]

mod common;

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use common::{LEADS, answers, instance, open, report};
use rswap_controller::{
    Address,
    link::call,
    reporter::{Answered, Outgoing, Reporter},
    serve_at,
};
use rswap_fleet::model::Revision;
use serde_json::{Value, json};
use tokio::sync::mpsc;

const CHILD: &str = "RSWAP_CONTROLLER_TEST";

/// Not a test by itself: the controller that the next one kills.
#[tokio::test]
async fn child_that_serves() {
    let Some(directory) = std::env::var_os(CHILD).map(PathBuf::from) else { return };
    let address = Address(directory.join("controller.sock"));
    serve_at(open(&directory), &address, None, std::future::pending()).await.unwrap();
}

fn spawn_controller(directory: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child_that_serves", "--nocapture"]).env(CHILD, directory);
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

struct Agent {
    reporter: Reporter,
    answered: mpsc::UnboundedReceiver<Answered>,
    made: u64,
}

impl Agent {
    fn start(directory: &Path) -> Self {
        let (sender, answered) = mpsc::unbounded_channel();
        let address = Address(directory.join("controller.sock"));
        let reporter =
            Reporter::start(Box::new(address), &directory.join("spool"), 64 << 20, sender).unwrap();
        Self { reporter, answered, made: 0 }
    }

    /// Hands over a report.
    async fn report(&mut self) {
        let report = report("a", 1, vec![instance("x")]);
        let leads = (LEADS.0, LEADS.1.to_vec());
        let next = Outgoing { report, lessons: Vec::new(), knows: Revision::default(), leads };
        self.reporter.report(next);
        tokio::time::sleep(Duration::from_millis(2)).await;
        self.made += 1;
    }
}

#[tokio::test]
async fn no_report_is_lost_or_counted_twice_when_controller_and_agent_are_killed() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let address = Address(directory.join("controller.sock"));
    let mut made = 0;
    for round in 0..4 {
        // The agent goes on alone at first, and catches up.
        let mut agent = Agent::start(directory);
        for _ in 0..10 {
            agent.report().await;
        }
        let mut child = spawn_controller(directory);
        answers(&address).await;
        let until = Instant::now() + Duration::from_millis(200 + 50 * round);
        while Instant::now() < until {
            agent.report().await;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        for _ in 0..5 {
            agent.report().await;
        }
        made += agent.made;
        // The thread takes what was handed over before it ends with the agent.
        drop(agent.reporter);
        while agent.answered.recv().await.is_some() {}
    }
    assert!(made > 100, "too few were made for this to be a test: {made}");
    let mut child = spawn_controller(directory);
    answers(&address).await;
    let mut agent = Agent::start(directory);
    let since = Instant::now();
    agent.report().await;
    made += 1;
    let hosts: Value = loop {
        let hosts: Value = call(&address, "/v1/hosts", None).await.unwrap();
        if hosts[0]["reports"]["taken"] == json!(made) {
            break hosts;
        }
        assert!(since.elapsed() < Duration::from_secs(20), "{made} were made: {hosts}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert_eq!(hosts[0]["reports"]["skipped"], 0, "{hosts}");
    let rows: Vec<Value> = call(&address, "/v1/history?instance=x&tier=2", None).await.unwrap();
    let windows: u64 = rows.iter().map(|row| row["used"]["cpu"]["windows"].as_u64().unwrap()).sum();
    assert_eq!(windows, made * 10);
    child.kill().unwrap();
    child.wait().unwrap();
}
