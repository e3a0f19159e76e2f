//! The columns of PgBouncer 1.24's answers, by name, order and type (`admin.c` there): scrapers go by the order as well as by
//! the names.

use crate::wire::console::Kind::{Int4, Int8, Numeric, Text};
use crate::wire::console::{Column, Kind};

pub(super) const fn column(name: &'static str, kind: Kind) -> Column {
    Column { name, kind }
}

pub(super) const POOLS: &[Column] = &[
    column("database", Text),
    column("user", Text),
    column("cl_active", Int4),
    column("cl_waiting", Int4),
    column("cl_active_cancel_req", Int4),
    column("cl_waiting_cancel_req", Int4),
    column("sv_active", Int4),
    column("sv_active_cancel", Int4),
    column("sv_being_canceled", Int4),
    column("sv_idle", Int4),
    column("sv_used", Int4),
    column("sv_tested", Int4),
    column("sv_login", Int4),
    column("maxwait", Int4),
    column("maxwait_us", Int4),
    column("pool_mode", Text),
    column("load_balance_hosts", Text),
];

/// Of clients and servers alike.
pub(super) const SOCKETS: &[Column] = &[
    column("type", Text),
    column("user", Text),
    column("database", Text),
    column("replication", Text),
    column("state", Text),
    column("addr", Text),
    column("port", Int4),
    column("local_addr", Text),
    column("local_port", Int4),
    column("connect_time", Text),
    column("request_time", Text),
    column("wait", Int4),
    column("wait_us", Int4),
    column("close_needed", Int4),
    column("ptr", Text),
    column("link", Text),
    column("remote_pid", Int4),
    column("tls", Text),
    column("application_name", Text),
    column("prepared_statements", Int4),
    column("id", Int4),
];

pub(super) const DATABASES: &[Column] = &[
    column("name", Text),
    column("host", Text),
    column("port", Int4),
    column("database", Text),
    column("force_user", Text),
    column("pool_size", Int4),
    column("min_pool_size", Int4),
    column("reserve_pool_size", Int4),
    column("server_lifetime", Int4),
    column("pool_mode", Text),
    column("load_balance_hosts", Text),
    column("max_connections", Int4),
    column("current_connections", Int4),
    column("max_client_connections", Int4),
    column("current_client_connections", Int4),
    column("paused", Int4),
    column("disabled", Int4),
];

pub(super) const USERS: &[Column] = &[
    column("name", Text),
    column("pool_size", Text),
    column("reserve_pool_size", Text),
    column("pool_mode", Text),
    column("max_user_connections", Int4),
    column("current_connections", Int4),
    column("max_user_client_connections", Int4),
    column("current_client_connections", Int4),
];

pub(super) const LISTS: &[Column] = &[column("list", Text), column("items", Int4)];
pub(super) const STATE: &[Column] = &[column("key", Text), column("value", Text)];
pub(super) const VERSION: &[Column] = &[column("version", Text)];
pub(super) const CONFIG: &[Column] = &[
    column("key", Text),
    column("value", Text),
    column("default", Text),
    column("changeable", Text),
];
pub(super) const PEERS: &[Column] = &[
    column("peer_id", Int4),
    column("host", Text),
    column("port", Int4),
    column("pool_size", Int4),
];
pub(super) const PEER_POOLS: &[Column] = &[
    column("peer_id", Int4),
    column("cl_active_cancel_req", Int4),
    column("cl_waiting_cancel_req", Int4),
    column("sv_active_cancel", Int4),
    column("sv_login", Int4),
];
pub(super) const DNS_HOSTS: &[Column] = &[column("hostname", Text), column("ttl", Int8), column("addrs", Text)];
pub(super) const DNS_ZONES: &[Column] = &[column("zonename", Text), column("serial", Int8), column("count", Int4)];
pub(super) const MEM: &[Column] = &[
    column("name", Text),
    column("size", Int4),
    column("used", Int4),
    column("free", Int4),
    column("memtotal", Int4),
];

/// As `numeric`, which PgBouncer has for everything that grows for ever.
pub(super) const fn total(name: &'static str) -> Column {
    column(name, Numeric)
}
