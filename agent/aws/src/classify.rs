//! What a service's error code means to the product.

use std::time::Duration;

use stanchion_core::cloud::{Ec2Action, Ec2Error, SinkError};

/// EC2's error codes and texts, sorted by what the planner does about them.
///
/// `InvalidParameterValue` is EC2's word for many things, and only its text tells them apart: a full subnet
/// (CreateNetworkInterface, AssignPrivateIpAddresses), a taken device index (AttachNetworkInterface), an address that is
/// not on the ENI (Unassign…).
pub fn ec2_error(action: Ec2Action, code: &str, message: &str) -> Ec2Error {
    let (code, message) = (code.to_owned(), message.to_owned());
    match code.as_str() {
        "RequestLimitExceeded"
        | "Throttling"
        | "ThrottlingException"
        | "RequestThrottled"
        | "TooManyRequestsException"
        | "BandwidthLimitExceeded"
        | "SlowDown" => Ec2Error::Throttled { action, code },
        "InsufficientFreeAddressesInSubnet" | "InsufficientCidrBlocks" | "InsufficientFreeAddresses" => {
            Ec2Error::InsufficientAddresses { action, code, message }
        }
        "PrivateIpAddressLimitExceeded" | "Ipv6AddressLimitExceeded" => Ec2Error::AddressLimit { action, message },
        "AttachmentLimitExceeded" => Ec2Error::AttachmentConflict { action, code, message },
        "InvalidParameterValue" => {
            if says_full(&message) {
                Ec2Error::InsufficientAddresses { action, code, message }
            } else if action == Ec2Action::AttachNetworkInterface && message.contains("already has an interface attached") {
                Ec2Error::AttachmentConflict { action, code, message }
            } else if is_unassign(action) && message.contains("not assigned to interface") {
                Ec2Error::NotFound { action, code, message }
            } else {
                Ec2Error::Other { action, code, message }
            }
        }
        "UnauthorizedOperation" | "AuthFailure" | "AccessDenied" | "AccessDeniedException" | "Client.UnauthorizedOperation" => {
            Ec2Error::Unauthorized { action, code, message }
        }
        code_text if is_bad_credentials(code_text) => Ec2Error::Unauthorized { action, code, message },
        code_text if code_text.ends_with(".NotFound") || code_text.ends_with("NotFoundException") => {
            Ec2Error::NotFound { action, code, message }
        }
        _ => Ec2Error::Other { action, code, message },
    }
}

/// CloudWatch Logs' error codes, sorted by what the shipper does about them.
pub fn sink_error(code: &str, status: u16, message: &str, retry_after: Option<Duration>) -> SinkError {
    // Some front ends write the shape's namespace before its name.
    let code = code.rsplit('#').next().unwrap_or(code);
    let text = || if message.is_empty() { code.to_owned() } else { format!("{code}: {message}") };
    match code {
        "ResourceNotFoundException" => SinkError::NotFound(text()),
        "ThrottlingException"
        | "Throttling"
        | "RequestLimitExceeded"
        | "TooManyRequestsException"
        | "ServiceUnavailableException"
        | "ServiceUnavailable"
        | "LimitExceededException"
        | "OperationAbortedException"
        | "SlowDown" => SinkError::Throttled { message: text(), retry_after },
        "AccessDeniedException" | "AccessDenied" | "UnauthorizedOperation" => SinkError::Unauthorized(text()),
        _ if is_bad_credentials(code) => SinkError::Unauthorized(text()),
        // What is known to speak of the request: the shipper drops events for it.
        "InvalidParameterException"
        | "InvalidParameterValue"
        | "InvalidParameterCombination"
        | "ValidationException"
        | "ValidationError"
        | "SerializationException"
        | "DataAlreadyAcceptedException"
        | "ResourceAlreadyExistsException" => SinkError::Invalid(text()),
        _ if status == 413 => SinkError::Invalid(text()),
        _ if status == 429 => SinkError::Throttled { message: text(), retry_after },
        _ if matches!(status, 401 | 403 | 407) => SinkError::Unauthorized(text()),
        // A proxy's page, or a code that we do not know: the events are kept.
        _ => SinkError::Unavailable(text()),
    }
}

/// The request was signed with credentials that the service does not take (any more).
pub(crate) fn is_bad_credentials(code: &str) -> bool {
    matches!(
        code,
        "ExpiredToken"
            | "ExpiredTokenException"
            | "RequestExpired"
            | "InvalidClientTokenId"
            | "UnrecognizedClientException"
            | "InvalidSignatureException"
            | "SignatureDoesNotMatch"
            | "MissingAuthenticationToken"
            | "MissingAuthenticationTokenException"
            | "IncompleteSignature"
            | "OptInRequired"
            | "Blocked"
    )
}

fn says_full(message: &str) -> bool {
    // CreateNetworkInterface on a subnet without room: "There aren't sufficient free Ipv4 addresses or prefixes".
    let message = message.to_ascii_lowercase();
    message.contains("sufficient free") || message.contains("enough free")
}

fn is_unassign(action: Ec2Action) -> bool {
    matches!(action, Ec2Action::UnassignPrivateIpAddresses | Ec2Action::UnassignIpv6Addresses)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The variant's name, for tables.
    fn kind(error: &Ec2Error) -> &'static str {
        match error {
            Ec2Error::Throttled { .. } => "Throttled",
            Ec2Error::InsufficientAddresses { .. } => "InsufficientAddresses",
            Ec2Error::AddressLimit { .. } => "AddressLimit",
            Ec2Error::AttachmentConflict { .. } => "AttachmentConflict",
            Ec2Error::NotFound { .. } => "NotFound",
            Ec2Error::Unauthorized { .. } => "Unauthorized",
            Ec2Error::NoReply { .. } => "NoReply",
            Ec2Error::Other { .. } => "Other",
        }
    }

    #[test]
    fn ec2_codes_and_texts_are_told_apart() {
        use Ec2Action::{
            AssignPrivateIpAddresses, AttachNetworkInterface, CreateNetworkInterface, DeleteNetworkInterface, DescribeNetworkInterfaces,
            UnassignPrivateIpAddresses,
        };
        let full = "There aren't sufficient free Ipv4 addresses or prefixes";
        let taken = "Instance 'i-1' already has an interface attached at device index '1'.";
        let gone = "Some of the specified addresses are not assigned to interface eni-1";
        for (action, code, message, want) in [
            (CreateNetworkInterface, "RequestLimitExceeded", "", "Throttled"),
            (CreateNetworkInterface, "InsufficientFreeAddressesInSubnet", "", "InsufficientAddresses"),
            (AssignPrivateIpAddresses, "InsufficientCidrBlocks", "", "InsufficientAddresses"),
            (CreateNetworkInterface, "InvalidParameterValue", full, "InsufficientAddresses"),
            (AssignPrivateIpAddresses, "InvalidParameterValue", full, "InsufficientAddresses"),
            (CreateNetworkInterface, "InvalidParameterValue", "Value (x) for parameter groupId is invalid", "Other"),
            (AttachNetworkInterface, "InvalidParameterValue", taken, "AttachmentConflict"),
            (AttachNetworkInterface, "AttachmentLimitExceeded", "", "AttachmentConflict"),
            (UnassignPrivateIpAddresses, "InvalidParameterValue", gone, "NotFound"),
            (AssignPrivateIpAddresses, "PrivateIpAddressLimitExceeded", "", "AddressLimit"),
            (DescribeNetworkInterfaces, "InvalidNetworkInterfaceID.NotFound", "", "NotFound"),
            (DeleteNetworkInterface, "InvalidAttachmentID.NotFound", "", "NotFound"),
            (CreateNetworkInterface, "UnauthorizedOperation", "", "Unauthorized"),
            (CreateNetworkInterface, "AuthFailure", "", "Unauthorized"),
            (CreateNetworkInterface, "RequestExpired", "", "Unauthorized"),
            (DeleteNetworkInterface, "InvalidParameterValue", "Network interface 'eni-1' is currently in use.", "Other"),
            (CreateNetworkInterface, "InternalError", "", "Other"),
        ] {
            assert_eq!(kind(&ec2_error(action, code, message)), want, "{action:?} {code} {message}");
        }
    }

    #[test]
    fn sink_codes_are_told_apart() {
        let name = |code: &str, status| match sink_error(code, status, "m", None) {
            SinkError::NotFound(_) => "NotFound",
            SinkError::Throttled { .. } => "Throttled",
            SinkError::Invalid(_) => "Invalid",
            SinkError::Unauthorized(_) => "Unauthorized",
            SinkError::Unavailable(_) => "Unavailable",
        };
        for (code, status, want) in [
            ("ResourceNotFoundException", 400, "NotFound"),
            ("com.amazonaws.logs#ResourceNotFoundException", 400, "NotFound"),
            ("ThrottlingException", 400, "Throttled"),
            ("ServiceUnavailableException", 503, "Throttled"),
            ("", 429, "Throttled"),
            ("InternalFailure", 500, "Unavailable"),
            ("", 502, "Unavailable"),
            ("AccessDeniedException", 400, "Unauthorized"),
            ("ExpiredTokenException", 400, "Unauthorized"),
            ("InvalidParameterException", 400, "Invalid"),
            ("SerializationException", 400, "Invalid"),
            ("ValidationException", 400, "Invalid"),
            ("", 413, "Invalid"),
            ("HTTP 403", 403, "Unauthorized"),
            ("HTTP 407", 407, "Unauthorized"),
            ("HTTP 404", 404, "Unavailable"),
            ("NewlyInventedException", 400, "Unavailable"),
        ] {
            assert_eq!(name(code, status), want, "{code} {status}");
        }
    }
}
