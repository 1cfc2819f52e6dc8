//! Connections are served: HTTP/1.1, so many at a time, of one caller so many, each so long at most.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{Extension, Router, extract::ConnectInfo, serve::Listener};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::JoinSet,
    time::timeout,
};

use crate::{Peer, link::Stream, peer::Who};

/// Connections through one door at a time; more wait outside.
const CONNECTIONS: usize = 256;
/// Those of one who has shown a certificate.
const OF_ONE: usize = 8;
/// How long the head of a request may take to come, also of a further one on a connection.
const HEAD_WITHIN: Duration = Duration::from_secs(10);
/// Bytes of it.
const HEAD_BYTES: usize = 64 << 10;
/// How long a connection may take, with all that comes and goes on it.
const CONNECTION_WITHIN: Duration = Duration::from_secs(120);
/// How long those may take that are being served when the controller ends; then they are cut.
pub(crate) const END_WITHIN: Duration = Duration::from_secs(35);

/// A caller that has come in.
pub(crate) type Entered = (Box<dyn Stream>, Peer);

/// Where callers come in.
pub(crate) trait Entrance: Send {
    /// The next one.
    fn next(&mut self) -> Pin<Box<dyn Future<Output = Entered> + Send + '_>>;
}

impl<L> Entrance for L
where
    L: Listener,
    L::Addr: Into<Peer>,
{
    fn next(&mut self) -> Pin<Box<dyn Future<Output = Entered> + Send + '_>> {
        Box::pin(async move {
            let (stream, address) = self.accept().await;
            let stream: Box<dyn Stream> = Box::new(stream);
            (stream, address.into())
        })
    }
}

/// Connections of each who has shown a certificate.
#[derive(Clone, Default)]
struct Places(Arc<Mutex<HashMap<String, usize>>>);

/// One of them, until it is dropped.
struct Taken(Option<(Places, String)>);

impl Places {
    fn take(&self, peer: &Peer) -> Option<Taken> {
        let who = match &peer.who {
            Who::Own => return Some(Taken(None)),
            Who::Agent(name) => format!("agent {name}"),
            Who::Operator { name, .. } => format!("operator {name}"),
        };
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(who.clone()).or_default();
        if *count >= OF_ONE {
            return None;
        }
        *count += 1;
        Some(Taken(Some((self.clone(), who))))
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let Some((places, who)) = self.0.take() else { return };
        let mut counts = places.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&who) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&who);
            }
        }
    }
}

/// Serves who comes through these doors until `stop` resolves, and those who are being served then to their end, or until `end_within` is
/// over: then nobody is served any more.
pub(crate) async fn serve(
    router: Router,
    doors: Vec<Box<dyn Entrance>>,
    stop: impl Future<Output = ()> + Send,
    end_within: Duration,
) {
    let (end, ending) = watch::channel(());
    let served =
        doors.into_iter().map(|door| tokio::spawn(at(door, router.clone(), ending.clone(), end_within)));
    let served: Vec<_> = served.collect();
    drop(ending);
    stop.await;
    // Nobody looks any more if all have ended.
    let _ = end.send(());
    for door in served {
        if let Err(error) = door.await {
            tracing::error!(%error, "a door of the controller has failed");
        }
    }
}

async fn at(
    mut door: Box<dyn Entrance>,
    router: Router,
    mut ending: watch::Receiver<()>,
    end_within: Duration,
) {
    let (free, places, graceful) =
        (Arc::new(Semaphore::new(CONNECTIONS)), Places::default(), GracefulShutdown::new());
    let mut served = JoinSet::new();
    loop {
        let entered = async {
            // Nobody closes it.
            let permit = free.clone().acquire_owned().await.ok();
            (door.next().await, permit)
        };
        let ((stream, peer), permit) = tokio::select! {
            entered = entered => entered,
            _ = ending.changed() => break,
        };
        // Those that have ended.
        while served.try_join_next().is_some() {}
        let Some(place) = places.take(&peer) else {
            tracing::warn!(from = peer.from, at_once = OF_ONE, "turned away: it has too many connections");
            continue;
        };
        served.spawn(one(stream, peer, &router, &graceful, (permit, place)));
    }
    // Nobody can come in any more.
    drop(door);
    if timeout(end_within, graceful.shutdown()).await.is_err() {
        tracing::warn!(
            cut = served.len(),
            within_s = end_within.as_secs(),
            "connections did not end by themselves"
        );
    }
    // What was acknowledged is stored; the others are sent again.
    served.shutdown().await;
}

fn one(
    stream: Box<dyn Stream>,
    peer: Peer,
    router: &Router,
    graceful: &GracefulShutdown,
    held: (Option<OwnedSemaphorePermit>, Taken),
) -> impl Future<Output = ()> + Send + 'static {
    let from = peer.from.clone();
    let service = TowerToHyperService::new(router.clone().layer(Extension(ConnectInfo(peer))));
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD_WITHIN).max_buf_size(HEAD_BYTES);
    let connection = graceful.watch(builder.serve_connection(TokioIo::new(stream), service));
    async move {
        match timeout(CONNECTION_WITHIN, connection).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::debug!(from, error = crate::writer::chain(&error), "a connection broke off")
            }
            Err(_) => {
                tracing::warn!(from, within_s = CONNECTION_WITHIN.as_secs(), "a connection took too long")
            }
        }
        drop(held);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use axum::routing::get;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::UnixStream,
        sync::oneshot,
    };

    use super::*;

    /// Hands out one stream, and then nothing.
    struct One(Option<UnixStream>);

    impl Entrance for One {
        fn next(&mut self) -> Pin<Box<dyn Future<Output = Entered> + Send + '_>> {
            Box::pin(async {
                match self.0.take() {
                    Some(stream) => (Box::new(stream) as Box<dyn Stream>, Peer::own("here".to_owned())),
                    None => std::future::pending().await,
                }
            })
        }
    }

    #[tokio::test]
    async fn at_the_end_whoever_is_still_served_is_cut() {
        let held = Arc::new(());
        let (begun, mut begins) = tokio::sync::mpsc::unbounded_channel();
        let kept = held.clone();
        let slow = move || {
            begun.send(()).expect("the test listens");
            let kept = kept.clone();
            async move {
                std::future::pending::<()>().await;
                drop(kept);
            }
        };
        let router = Router::new().route("/", get(slow));
        let (mut caller, served) = UnixStream::pair().expect("two ends");
        caller.write_all(b"GET / HTTP/1.1\r\nhost: rswap\r\n\r\n").await.expect("a request");
        let (stop, stopped) = oneshot::channel::<()>();
        let within = Duration::from_millis(200);
        let door: Box<dyn Entrance> = Box::new(One(Some(served)));
        let serving = tokio::spawn(serve(router, vec![door], async { drop(stopped.await) }, within));
        begins.recv().await.expect("it is being served");
        let since = Instant::now();
        stop.send(()).expect("it is served");
        timeout(Duration::from_secs(20), serving).await.expect("an end").expect("no panic");
        assert!(since.elapsed() >= within, "it had its time");
        // Not only left to itself: nothing of it is there any more, and the caller sees its end.
        assert_eq!(Arc::strong_count(&held), 1);
        let mut rest = Vec::new();
        let ended = timeout(Duration::from_secs(20), caller.read_to_end(&mut rest)).await;
        assert!(ended.is_ok() && rest.is_empty(), "{ended:?}");
    }

    #[test]
    fn one_caller_has_a_few_places_and_gives_them_back() {
        let places = Places::default();
        let agent =
            |name: &str| Peer { from: name.to_owned(), who: Who::Agent(name.parse().expect("a name")) };
        let of_a: Vec<_> = (0..OF_ONE).map(|_| places.take(&agent("a"))).collect();
        assert!(of_a.iter().all(Option::is_some));
        assert!(places.take(&agent("a")).is_none());
        assert!(places.take(&agent("b")).is_some());
        drop(of_a);
        assert!(places.take(&agent("a")).is_some());
        assert!(places.0.lock().expect("the places").is_empty());
        let own: Vec<_> = (0..2 * OF_ONE).map(|_| places.take(&Peer::own("here".to_owned()))).collect();
        assert!(own.iter().all(Option::is_some));
    }
}
