//! Names of the programs' read-only globals, which the agent sets before it loads them.
//!
//! Offsets are of fields in the running kernel's structures, in bytes, from its BTF: the programs are not
//! built for one kernel. The kernel's verifier sees a global as a constant once it is frozen, so a field
//! access through one is a plain typed load.

macro_rules! globals {
    ($($(#[$doc:meta])* $name:ident;)*) => {
        $($(#[$doc])* pub const $name: &str = stringify!($name);)*
    };
}

globals! {
    /// Number of slots in the maps.
    SLOT_COUNT;
    /// Number of shards of the block records, less one: the mask of a CPU's number.
    BLOCK_SHARD_MASK;
    /// 1: several CPUs share a shard, and add atomically.
    BLOCK_SHARDS_SHARED;
    /// `__REQ_BACKGROUND` as a mask.
    REQUEST_BACKGROUND;
    /// 0: the programs log nothing. 4: they log each event that they count (slow; for their developers).
    AYA_LOG_LEVEL;
    /// 1: a block request is charged to its `bio`'s cgroup where that one is tracked (cgroup v2 with `io`).
    BLOCK_BY_BLKCG;
    /// 1: a block request is charged to the cgroup of the task that submitted it.
    BLOCK_BY_SUBMITTER;

    /// `task_struct.pid`.
    TASK_PID;
    /// `task_struct.flags`.
    TASK_FLAGS;
    /// 1: the tracepoint says in which state the task is that goes, and the two below are known.
    SWITCH_HAS_STATE;
    /// 1: waits for a CPU are measured from when somebody wakes a task; the two programs for that are loaded.
    EXACT;
    /// Kinds of page faults that are timed: 1: major ones. 2: minor ones, too.
    FAULT_KINDS;
    /// `task_struct.in_iowait`: the byte that it is in.
    TASK_IN_IOWAIT;
    /// `task_struct.in_iowait`: a mask in that byte.
    TASK_IN_IOWAIT_MASK;
    /// `task_struct.cgroups`.
    TASK_CGROUPS;
    /// `task_struct.sched_info.last_queued`.
    TASK_LAST_QUEUED;
    /// `task_struct.sched_info.last_arrival`.
    TASK_LAST_ARRIVAL;
    /// `task_struct.se.cfs_rq`.
    TASK_CFS_RQ;
    /// `cfs_rq.rq`.
    CFS_RQ_RQ;
    /// `rq.clock`.
    RQ_CLOCK;
    /// `css_set.dfl_cgrp`.
    CSS_SET_DFL_CGRP;
    /// `cgroup.kn`.
    CGROUP_KN;
    /// `kernfs_node.id`.
    KERNFS_ID;
    /// 1: cgroups that are made in instances' are known from that moment on, and the four below are known.
    CHILDREN_KNOWN;
    /// `cgroup.self.parent`.
    CGROUP_PARENT;
    /// `cgroup_subsys_state.cgroup`.
    CSS_CGROUP;
    /// `cgroup.root`.
    CGROUP_ROOT;
    /// `cgroup_root.hierarchy_id`.
    ROOT_HIERARCHY_ID;

    /// `request.q`.
    REQUEST_Q;
    /// `request.bio`.
    REQUEST_BIO;
    /// `request.cmd_flags`.
    REQUEST_CMD_FLAGS;
    /// `request.__data_len`.
    REQUEST_DATA_LEN;
    /// `request.start_time_ns`.
    REQUEST_START_NS;
    /// `request.io_start_time_ns`.
    REQUEST_IO_START_NS;
    /// `request_queue.disk`.
    QUEUE_DISK;
    /// `gendisk.major`.
    DISK_MAJOR;
    /// `gendisk.first_minor`.
    DISK_FIRST_MINOR;
    /// `bio.bi_blkg`.
    BIO_BLKG;
    /// `blkcg_gq.blkcg`.
    BLKG_BLKCG;
    /// `blkcg.css.cgroup`.
    BLKCG_CGROUP;

    /// `sock.sk_protocol`.
    SOCK_PROTOCOL;
    /// `sock.sk_type`.
    SOCK_TYPE;
    /// `sock.__sk_common.skc_state`.
    SOCK_STATE;
    /// `sock.sk_cgrp_data.cgroup`.
    SOCK_CGROUP;
    /// `sock.__sk_common.skc_flags`.
    SOCK_FLAGS;
    /// In these, `SOCK_DONE`.
    SOCK_DONE;
    /// `socket.sk`.
    SOCKET_SK;
    /// 1: the tracepoint of what is sent again says whether that failed.
    RETRANSMIT_HAS_ERROR;
    /// `tcp_sock.srtt_us`.
    TCP_SRTT_US;
    /// `tcp_sock.bytes_received`.
    TCP_BYTES_RECEIVED;
    /// `tcp_sock.bytes_sent`.
    TCP_BYTES_SENT;
    /// `tcp_sock.bytes_retrans`.
    TCP_BYTES_RETRANSMITTED;

    /// The device of the file system that is watched, as the kernel numbers it: 20 bits of minor.
    WRITTEN_DEVICE;
    /// `PG_head`.
    FOLIO_LARGE_BIT;
    /// `folio.flags`.
    FOLIO_FLAGS;
    /// `folio._flags_1`.
    FOLIO_FLAGS_1;
    /// `folio.index`.
    FOLIO_INDEX;
    /// `address_space.host`.
    MAPPING_HOST;
    /// `inode.i_sb`.
    INODE_SB;
    /// `inode.i_ino`.
    INODE_INO;
    /// `super_block.s_dev`.
    SUPER_BLOCK_DEV;
    /// `kiocb.ki_filp`.
    KIOCB_FILE;
    /// `file.f_inode`.
    FILE_INODE;
    /// `iov_iter.data_source`.
    ITER_DATA_SOURCE;
}
