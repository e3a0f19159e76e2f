//! What is measured, and what is wanted of it.

use super::way::Kind;

/// Before which server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Before {
    Stub,
    Postgres,
}

/// How a query is asked.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Form {
    Simple,
    Prepared,
}

/// What is done once per round and way.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Work {
    /// One client, everything on one processor.
    PingPong(Form),
    /// So many clients at once.
    Crowd(usize),
    /// A query whose answer is long, and MiB of it.
    Rows(&'static str),
    /// A statement that copies in, and MiB of it.
    CopyIn(&'static str, usize),
    /// Connections that ask once and end.
    Connect,
    /// So many connections that do nothing.
    Idle(usize),
    /// A proxy that nobody uses.
    Sidecar,
    /// One client with small queries, and three with bulk.
    Beside,
    /// pgbench, one client, everything on one processor.
    Pgbench,
    /// System calls, counted by strace, of small queries or of a long answer.
    Calls(Traced),
}

/// What is traced.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Traced {
    Messages,
    Connections,
    Rows(&'static str, usize),
}

/// One number that a work gives.
#[derive(Debug)]
pub(crate) struct Figure {
    pub(crate) name: &'static str,
    pub(crate) compare: Compare,
    pub(crate) goal: Goal,
}

/// How a figure stands beside HAProxy's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compare {
    /// As it is.
    Whole,
    /// What it is more than without a proxy.
    Added,
    /// Not at all.
    Alone,
}

/// What is wanted of a figure of ours.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Goal {
    None,
    /// A ratio to HAProxy of at most this.
    RatioMax(f64),
    /// A ratio to HAProxy of at least this.
    RatioMin(f64),
    /// At most this much.
    Max(f64),
}

/// What belongs together in a table.
#[derive(Debug)]
pub(crate) struct Measure {
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    pub(crate) before: Before,
    pub(crate) work: Work,
    pub(crate) figures: &'static [Figure],
    /// With TLS between the client and the proxy.
    pub(crate) tls: bool,
    /// HAProxy's splice too.
    pub(crate) splice: bool,
    /// What hardly varies needs fewer.
    pub(crate) rounds_max: usize,
}

impl Measure {
    /// How many files a process must be able to open.
    pub(crate) const fn files(&self) -> usize {
        match self.work {
            Work::Idle(size) => 2 * size + 500,
            _ => 500,
        }
    }

    pub(crate) fn takes(&self, kind: Kind) -> bool {
        match kind {
            Kind::HaProxySplice => self.splice,
            Kind::Direct => !matches!(self.work, Work::Calls(_) | Work::Sidecar),
            _ => true,
        }
    }
}

const fn whole(name: &'static str, goal: Goal) -> Figure {
    Figure {
        name,
        compare: Compare::Whole,
        goal,
    }
}

const fn added(name: &'static str, goal: Goal) -> Figure {
    Figure {
        name,
        compare: Compare::Added,
        goal,
    }
}

const fn alone(name: &'static str, goal: Goal) -> Figure {
    Figure {
        name,
        compare: Compare::Alone,
        goal,
    }
}

/// Of one client that asks and waits.
const ASKING: &[Figure] = &[
    added("p50 us", Goal::RatioMax(0.80)),
    alone("p99 us", Goal::None),
    alone("p99.9 us", Goal::None),
    whole("CPU us/query", Goal::RatioMax(0.80)),
    whole("switches/1000 queries", Goal::None),
];
const CROWD: &[Figure] = &[
    whole("CPU us/query", Goal::RatioMax(0.85)),
    whole("queries/s", Goal::None),
    whole("switches/1000 queries", Goal::None),
];
const ROWS_OUT: &[Figure] = &[
    whole("CPU s/GB", Goal::RatioMax(0.38)),
    whole("GB/s", Goal::RatioMin(1.3)),
    whole("switches/MB", Goal::None),
];
const ROWS_OUT_8K: &[Figure] = &[
    whole("CPU s/GB", Goal::None),
    whole("GB/s", Goal::None),
    whole("switches/MB", Goal::None),
];
const ROWS_IN: &[Figure] = &[
    whole("CPU s/GB", Goal::RatioMax(0.33)),
    whole("GB/s", Goal::None),
    whole("switches/MB", Goal::None),
];
const CONNECTING: &[Figure] = &[
    whole("CPU us/connection", Goal::RatioMax(0.9)),
    added("p50 us", Goal::None),
    whole("connections/s", Goal::None),
];
const IDLING: &[Figure] = &[
    alone("own KiB/connection", Goal::Max(2.0)),
    alone("kernel KiB/connection, all ends", Goal::None),
    alone("files/connection", Goal::None),
    alone("CPU ms/s", Goal::None),
];
const SIDECAR: &[Figure] = &[
    alone("resident MiB", Goal::Max(8.0)),
    alone("of it, by its share", Goal::None),
    alone("of it, its own", Goal::None),
];
const BESIDE: &[Figure] = &[
    whole("p50 ms", Goal::RatioMax(0.5)),
    whole("p99 ms", Goal::None),
    whole("GB/s beside it", Goal::None),
];
const PGBENCH: &[Figure] = &[
    added("mean us", Goal::RatioMax(0.80)),
    whole("CPU us/query", Goal::RatioMax(0.80)),
];
const POSTGRES_OUT: &[Figure] = &[
    whole("CPU s/GB", Goal::RatioMax(0.75)),
    whole("GB/s", Goal::RatioMin(1.0)),
    whole("switches/MB", Goal::None),
];
const POSTGRES_IN: &[Figure] = &[
    whole("CPU s/GB", Goal::RatioMax(0.33)),
    whole("GB/s", Goal::RatioMin(1.0)),
    whole("switches/MB", Goal::None),
];
/// With TLS no goal is set, and the server that is spoken to directly has none.
const TLS_ASKING: &[Figure] = &[
    whole("p50 us", Goal::None),
    alone("p99 us", Goal::None),
    alone("p99.9 us", Goal::None),
    whole("CPU us/query", Goal::None),
    whole("switches/1000 queries", Goal::None),
];
const TLS_CONNECTING: &[Figure] = &[
    whole("CPU us/connection", Goal::None),
    whole("p50 us", Goal::None),
    whole("connections/s", Goal::None),
];
const TLS_IDLING: &[Figure] = &[
    whole("own KiB/connection", Goal::None),
    alone("kernel KiB/connection, all ends", Goal::None),
    alone("files/connection", Goal::None),
    alone("CPU ms/s", Goal::None),
];
const CALLS_MESSAGES: &[Figure] = &[alone("calls/message", Goal::Max(3.1))];
const CALLS_CONNECTIONS: &[Figure] = &[alone("calls/connection", Goal::None)];
const CALLS_ROWS: &[Figure] = &[alone("calls/MiB", Goal::None)];

const fn before_stub(name: &'static str, title: &'static str, work: Work, figures: &'static [Figure]) -> Measure {
    Measure {
        name,
        title,
        before: Before::Stub,
        work,
        figures,
        tls: false,
        splice: matches!(work, Work::Rows(_) | Work::CopyIn(..) | Work::Calls(_)),
        rounds_max: match work {
            Work::Calls(_) => 1,
            Work::Idle(_) | Work::Sidecar => 3,
            _ => usize::MAX,
        },
    }
}

const fn with_tls(name: &'static str, title: &'static str, work: Work, figures: &'static [Figure]) -> Measure {
    Measure {
        tls: true,
        splice: false,
        ..before_stub(name, title, work, figures)
    }
}

const fn before_postgres(name: &'static str, title: &'static str, work: Work, figures: &'static [Figure]) -> Measure {
    Measure {
        before: Before::Postgres,
        ..before_stub(name, title, work, figures)
    }
}

pub(crate) static MEASURES: &[Measure] = &[
    before_stub(
        "prepared",
        "stub, one client, prepared, one CPU",
        Work::PingPong(Form::Prepared),
        ASKING,
    ),
    before_stub(
        "simple",
        "stub, one client, simple query, one CPU",
        Work::PingPong(Form::Simple),
        ASKING,
    ),
    before_stub("clients-16", "stub, 16 clients, prepared", Work::Crowd(16), CROWD),
    before_stub("clients-64", "stub, 64 clients, prepared", Work::Crowd(64), CROWD),
    before_stub("rows", "stub, rows out, large writes", Work::Rows("bulk 512"), ROWS_OUT),
    before_stub(
        "rows-8k",
        "stub, rows out, writes of 8 KiB",
        Work::Rows("bulk8k 256"),
        ROWS_OUT_8K,
    ),
    before_stub(
        "copy-in",
        "stub, COPY in",
        Work::CopyIn("COPY t FROM STDIN", 512),
        ROWS_IN,
    ),
    before_stub(
        "beside",
        "stub, a small query beside three bulk streams",
        Work::Beside,
        BESIDE,
    ),
    before_stub("connect", "stub, connect, query, close", Work::Connect, CONNECTING),
    before_stub("sidecar", "a proxy that nobody uses", Work::Sidecar, SIDECAR),
    before_stub("idle-1000", "stub, 1000 idle connections", Work::Idle(1000), IDLING),
    before_stub("idle-5000", "stub, 5000 idle connections", Work::Idle(5000), IDLING),
    before_stub(
        "calls-messages",
        "stub, system calls of small queries, prepared",
        Work::Calls(Traced::Messages),
        CALLS_MESSAGES,
    ),
    before_stub(
        "calls-connections",
        "stub, system calls of connect, query, close",
        Work::Calls(Traced::Connections),
        CALLS_CONNECTIONS,
    ),
    before_stub(
        "calls-rows",
        "stub, system calls of rows out, large writes",
        Work::Calls(Traced::Rows("bulk 128", 128)),
        CALLS_ROWS,
    ),
    before_stub(
        "calls-rows-8k",
        "stub, system calls of rows out, writes of 8 KiB",
        Work::Calls(Traced::Rows("bulk8k 128", 128)),
        CALLS_ROWS,
    ),
    with_tls(
        "tls-prepared",
        "stub, TLS, one client, prepared, one CPU",
        Work::PingPong(Form::Prepared),
        TLS_ASKING,
    ),
    with_tls(
        "tls-rows",
        "stub, TLS, rows out, large writes",
        Work::Rows("bulk 256"),
        ROWS_OUT_8K,
    ),
    with_tls(
        "tls-copy-in",
        "stub, TLS, COPY in",
        Work::CopyIn("COPY t FROM STDIN", 256),
        ROWS_OUT_8K,
    ),
    with_tls(
        "tls-connect",
        "stub, TLS (ECDSA), connect, query, close",
        Work::Connect,
        TLS_CONNECTING,
    ),
    with_tls(
        "tls-idle-1000",
        "stub, TLS, 1000 idle connections",
        Work::Idle(1000),
        TLS_IDLING,
    ),
    before_postgres(
        "pgbench",
        "PostgreSQL, pgbench -S, one client, one CPU",
        Work::Pgbench,
        PGBENCH,
    ),
    before_postgres(
        "postgres-copy-out",
        "PostgreSQL, COPY out",
        Work::Rows(super::postgres::COPY_OUT),
        POSTGRES_OUT,
    ),
    before_postgres(
        "postgres-copy-in",
        "PostgreSQL, COPY in",
        Work::CopyIn(super::postgres::COPY_IN, 64),
        POSTGRES_IN,
    ),
];
