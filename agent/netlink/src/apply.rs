//! Performs operations; decides nothing.

use stanchion_core::network::{NetOp, Rule};

use crate::message::request;
use crate::socket::{Netlink, NetlinkError};

impl Netlink {
    /// Performs netlink operations in order, in one batch; one result for each. That a rule to be added is there, or a thing to
    /// be removed is gone, is success. Sysctls and nft documents are none of a socket's business and must not be among them.
    ///
    /// # Errors
    /// When the socket failed; then it is not known what was done.
    pub fn perform(&mut self, ops: &[NetOp]) -> Result<Vec<Result<(), NetlinkError>>, NetlinkError> {
        debug_assert!(!ops.iter().any(|op| matches!(op, NetOp::Sysctl { .. } | NetOp::Nft { .. } | NetOp::Legacy { .. })), "not netlink's");
        let results = self.batch(ops.iter().filter_map(request).collect())?;
        Ok(results.into_iter().zip(ops).map(|(result, op)| tolerate(op, result)).collect())
    }

    /// Deletes one rule; whether there was one. Table 0 stands for any.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn delete_rule(&mut self, rule: &Rule) -> Result<bool, NetlinkError> {
        let Some(request) = request(&NetOp::DeleteRule(rule.clone())) else { return Ok(false) };
        match self.request(request) {
            Ok(()) => Ok(true),
            Err(error) if error.is_absent() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Performs netlink operations and stops caring at the first failure, which it returns; the later ones of the batch were tried too.
    ///
    /// # Errors
    /// The first failure.
    pub fn perform_all(&mut self, ops: &[NetOp]) -> Result<(), NetlinkError> {
        self.perform(ops)?.into_iter().collect()
    }
}

fn tolerate(op: &NetOp, result: Result<(), NetlinkError>) -> Result<(), NetlinkError> {
    match (op, result) {
        (NetOp::AddRule(_), Err(error)) if error.errno() == Some(libc::EEXIST) => Ok(()),
        (op, Err(error)) if op.removes() && error.is_absent() => Ok(()),
        (_, result) => result,
    }
}
