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
    io::{AsyncRead, AsyncWrite},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::JoinSet,
    time::timeout,
};

/// How long the head of a request may take to come, also of a further one on a connection.
pub const HEAD_WITHIN: Duration = Duration::from_secs(10);
/// Bytes of it.
const HEAD_BYTES: usize = 64 << 10;

/// How much is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections through one entrance at a time; more wait outside.
    pub connections: usize,
    /// Those of one caller, where callers are told apart.
    pub of_one: usize,
    /// How long a connection may take, with all that comes and goes on it.
    pub connection_within: Option<Duration>,
    /// How long those may take that are being served at the end; then they are cut.
    pub end_within: Duration,
}

/// Both ways.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Stream for T {}

/// Who is at the other end. The routes get it as [`ConnectInfo`].
pub trait Caller: Clone + Send + Sync + 'static {
    /// For people.
    fn from(&self) -> String;

    /// Those whose connections are counted together; `None`: as many are served as there is room for.
    fn counted_as(&self) -> Option<String>;
}

/// A caller that has come in.
pub type Entered<C> = (Box<dyn Stream>, C);

/// Where callers come in.
pub trait Entrance<C>: Send {
    /// The next one.
    fn next(&mut self) -> Pin<Box<dyn Future<Output = Entered<C>> + Send + '_>>;
}

impl<C, L> Entrance<C> for L
where
    L: Listener,
    L::Addr: Into<C>,
{
    fn next(&mut self) -> Pin<Box<dyn Future<Output = Entered<C>> + Send + '_>> {
        Box::pin(async move {
            let (stream, address) = self.accept().await;
            let stream: Box<dyn Stream> = Box::new(stream);
            (stream, address.into())
        })
    }
}

/// Connections of each caller that is told apart.
#[derive(Clone, Default)]
struct Places(Arc<Mutex<HashMap<String, usize>>>);

/// One of them, until it is dropped.
struct Taken(Option<(Places, String)>);

impl Places {
    fn take(&self, caller: &impl Caller, of_one: usize) -> Option<Taken> {
        let Some(who) = caller.counted_as() else { return Some(Taken(None)) };
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(who.clone()).or_default();
        if *count >= of_one {
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

/// Serves who comes through these doors until `stop` resolves, and those who are being served then to their end, or until
/// [`Limits::end_within`] is over: then nobody is served any more.
pub async fn serve<C: Caller>(
    router: Router,
    doors: Vec<Box<dyn Entrance<C>>>,
    limits: Limits,
    stop: impl Future<Output = ()> + Send,
) {
    let (end, ending) = watch::channel(());
    let served = doors.into_iter().map(|door| tokio::spawn(at(door, router.clone(), ending.clone(), limits)));
    let served: Vec<_> = served.collect();
    drop(ending);
    stop.await;
    // Nobody looks any more if all have ended.
    let _ = end.send(());
    for door in served {
        if let Err(error) = door.await {
            tracing::error!(%error, "an entrance has failed");
        }
    }
}

async fn at<C: Caller>(
    mut door: Box<dyn Entrance<C>>,
    router: Router,
    mut ending: watch::Receiver<()>,
    limits: Limits,
) {
    let (free, places, graceful) =
        (Arc::new(Semaphore::new(limits.connections)), Places::default(), GracefulShutdown::new());
    let mut served = JoinSet::new();
    loop {
        let entered = async {
            // Nobody closes it.
            let permit = free.clone().acquire_owned().await.ok();
            (door.next().await, permit)
        };
        let ((stream, caller), permit) = tokio::select! {
            entered = entered => entered,
            _ = ending.changed() => break,
        };
        // Those that have ended.
        while served.try_join_next().is_some() {}
        let Some(place) = places.take(&caller, limits.of_one) else {
            let from = caller.from();
            tracing::warn!(from, at_once = limits.of_one, "turned away: it has too many connections");
            continue;
        };
        served.spawn(one((stream, caller), &router, &graceful, limits, (permit, place)));
    }
    // Nobody can come in any more.
    drop(door);
    if timeout(limits.end_within, graceful.shutdown()).await.is_err() {
        tracing::warn!(
            cut = served.len(),
            within_s = limits.end_within.as_secs(),
            "connections did not end by themselves"
        );
    }
    // What was acknowledged is stored; the others are sent again.
    served.shutdown().await;
}

fn one<C: Caller>(
    (stream, caller): Entered<C>,
    router: &Router,
    graceful: &GracefulShutdown,
    limits: Limits,
    held: (Option<OwnedSemaphorePermit>, Taken),
) -> impl Future<Output = ()> + Send + use<C> {
    let from = caller.from();
    let service = TowerToHyperService::new(router.clone().layer(Extension(ConnectInfo(caller))));
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD_WITHIN).max_buf_size(HEAD_BYTES);
    let connection = graceful.watch(builder.serve_connection(TokioIo::new(stream), service));
    async move {
        let ended = match limits.connection_within {
            Some(within) => timeout(within, connection).await,
            None => Ok(connection.await),
        };
        match ended {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(from, error = crate::chain(&error), "a connection broke off"),
            Err(_) => {
                let within_s = limits.connection_within.map(|within| within.as_secs());
                tracing::warn!(from, within_s, "a connection took too long");
            }
        }
        drop(held);
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "nobody asks what the routes of these tests are")]
mod tests {
    use std::{path::Path, time::Instant};

    use axum::routing::get;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::{UnixListener, UnixStream},
        sync::oneshot,
    };

    use super::*;

    /// One caller, by name if it has one.
    #[derive(Clone)]
    struct Someone(Option<&'static str>);

    impl Caller for Someone {
        fn from(&self) -> String {
            "here".to_owned()
        }

        fn counted_as(&self) -> Option<String> {
            self.0.map(ToOwned::to_owned)
        }
    }

    const LIMITS: Limits =
        Limits { connections: 3, of_one: 2, connection_within: None, end_within: Duration::from_millis(200) };

    /// Hands out one stream, and then nothing.
    struct One(Option<UnixStream>);

    impl Entrance<Someone> for One {
        fn next(&mut self) -> Pin<Box<dyn Future<Output = Entered<Someone>> + Send + '_>> {
            Box::pin(async {
                match self.0.take() {
                    Some(stream) => (Box::new(stream) as Box<dyn Stream>, Someone(None)),
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
        let within = LIMITS.end_within;
        let door: Box<dyn Entrance<Someone>> = Box::new(One(Some(served)));
        let serving = tokio::spawn(serve(router, vec![door], LIMITS, async { drop(stopped.await) }));
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
        let take = |name: Option<&'static str>| places.take(&Someone(name), 8);
        let of_a: Vec<_> = (0..8).map(|_| take(Some("a"))).collect();
        assert!(of_a.iter().all(Option::is_some));
        assert!(take(Some("a")).is_none());
        assert!(take(Some("b")).is_some());
        drop(of_a);
        assert!(take(Some("a")).is_some());
        assert!(places.0.lock().expect("the places").is_empty());
        let uncounted: Vec<_> = (0..20).map(|_| take(None)).collect();
        assert!(uncounted.iter().all(Option::is_some));
    }

    /// A caller of `path`, who stays connected.
    async fn calls(path: &Path) -> UnixStream {
        let mut caller = UnixStream::connect(path).await.expect("it listens");
        caller.write_all(b"GET / HTTP/1.1\r\nhost: rswap\r\n\r\n").await.expect("a request");
        caller
    }

    async fn is_answered(caller: &mut UnixStream, within: Duration) -> bool {
        let mut answer = [0; 12];
        matches!(timeout(within, caller.read_exact(&mut answer)).await, Ok(Ok(_)))
            && answer.starts_with(b"HTTP/1.1 200")
    }

    #[tokio::test]
    async fn who_comes_when_all_places_are_taken_waits_for_one() {
        let directory = std::env::temp_dir().join(format!("rswap-http-{}", std::process::id()));
        drop(std::fs::remove_file(&directory));
        let listener = UnixListener::bind(&directory).expect("a socket");
        let router = Router::new().route("/", get(async || "here"));
        let door: Box<dyn Entrance<Someone>> = Box::new(Incoming(listener));
        tokio::spawn(serve(router, vec![door], LIMITS, std::future::pending()));
        let mut served = Vec::new();
        for _ in 0..LIMITS.connections {
            let mut caller = calls(&directory).await;
            assert!(is_answered(&mut caller, HEAD_WITHIN / 2).await);
            served.push(caller);
        }
        let mut waits = calls(&directory).await;
        assert!(!is_answered(&mut waits, Duration::from_millis(300)).await, "all places are taken");
        served.pop();
        assert!(is_answered(&mut waits, HEAD_WITHIN / 2).await, "one place is free");
        std::fs::remove_file(&directory).expect("the socket");
    }

    /// A listener whose callers are not told apart.
    struct Incoming(UnixListener);

    impl Entrance<Someone> for Incoming {
        fn next(&mut self) -> Pin<Box<dyn Future<Output = Entered<Someone>> + Send + '_>> {
            Box::pin(async {
                let (stream, _) = self.0.accept().await.expect("a caller");
                (Box::new(stream) as Box<dyn Stream>, Someone(None))
            })
        }
    }
}
